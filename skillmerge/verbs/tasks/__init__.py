"""The verbs of tasks on a cluster: `shard` makes some shards of a saved plan, `finish` makes an output of all."""
