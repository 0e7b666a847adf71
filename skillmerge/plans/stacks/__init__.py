"""Stacks of layers: what a recipe asks for over open models, and what config.json says of the result."""
