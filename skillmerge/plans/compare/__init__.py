"""What the models of a formula say of themselves, compared before any weight is read; one module a subject."""
