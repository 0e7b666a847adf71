"""The verb demo and its models: a small family that was really trained, and a forward pass for it."""
