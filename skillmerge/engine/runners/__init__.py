"""What makes shards: one module a runner, each keeping the promise of `engine.runner`."""
