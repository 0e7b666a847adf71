"""A recipe's models as its formula needs them, made of the checkpoints that were opened."""
