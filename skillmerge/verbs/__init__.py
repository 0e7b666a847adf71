"""What a person asks for: one module a verb, each a function that the command line and Python share."""
