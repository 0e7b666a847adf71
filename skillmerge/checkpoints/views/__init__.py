"""Checkpoints seen in another way: under other names, in another layout, kept nearby. One module for each way."""
