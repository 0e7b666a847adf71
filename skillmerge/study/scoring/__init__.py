"""How well a model does: scores with their uncertainty, and what measures them."""
