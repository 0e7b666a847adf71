"""The verb export: convert a stored skill to other formats, one module each."""
