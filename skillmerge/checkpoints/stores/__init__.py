"""Stores, which read the bytes of checkpoints, one module each; `checkpoints.store` defines their interface."""
