"""Measures by layer and module, from sums that were kept for each tensor."""
