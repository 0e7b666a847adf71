"""Which dtype each tensor of an output has, and which tensors take no arithmetic."""
