"""The verb export: a stored skill in the formats of others, one module a format."""
