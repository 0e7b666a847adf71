"""Recipe + headers -> plan: everything that is decided before weights are read. Never imports torch."""
