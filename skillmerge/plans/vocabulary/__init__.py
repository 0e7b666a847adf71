"""Rows of tokens, matched by what the tokens are and not by their ids."""
