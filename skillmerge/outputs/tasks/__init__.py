"""What tasks of a cluster leave beside the shards that they make."""
