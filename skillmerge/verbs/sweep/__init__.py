"""A recipe with many coefficients: candidates, their scores, the search and its journal."""
