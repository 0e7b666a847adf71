"""The tables and keys of a recipe as pydantic classes: what may be written, and what editors show of it."""
