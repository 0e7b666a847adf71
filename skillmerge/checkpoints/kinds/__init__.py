"""What weights can be stored as: one module a kind, and the table of them."""
