"""Tokenizer files: which id is which token, and how text becomes tokens."""
