"""A part of a saved plan: which shards a task makes, and what it reads to make them."""
