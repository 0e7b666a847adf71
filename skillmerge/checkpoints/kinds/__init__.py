"""What a checkpoint can be stored as besides dense safetensors: one module a kind."""
