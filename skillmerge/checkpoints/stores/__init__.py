"""Where the bytes of checkpoints are: one module a store, each keeping the promise of `checkpoints.store`."""
