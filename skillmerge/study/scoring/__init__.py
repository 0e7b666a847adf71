"""Scores of models with their uncertainty, and what measures them."""
