"""Outputs in buckets: written there shard by shard, and read from there."""
