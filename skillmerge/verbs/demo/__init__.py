"""The verb demo and its models: a small trained family, and a forward pass for it."""
