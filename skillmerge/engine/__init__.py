"""Plan -> finished shards: the stream of spans, the workers, their output and measurements."""
