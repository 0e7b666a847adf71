"""Plan -> finished shards: the stream of spans, the workers, and what they write and measure."""
