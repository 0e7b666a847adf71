"""What to say of models that do not fit together, and of rules that make them fit at a price; one module a subject."""
