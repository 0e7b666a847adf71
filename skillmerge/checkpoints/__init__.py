"""Where named tensors come from. A checkpoint kind gives `TensorSpec`s and fills byte ranges on demand.

`safetensors_header` reads and writes the file format's header, `folder` is the checkpoint on local disk.
"""
