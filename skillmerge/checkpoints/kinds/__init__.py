"""Kinds of stored weights, one module each, and their table."""
