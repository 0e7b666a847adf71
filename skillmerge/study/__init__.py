"""Measuring and judging models: inspection, forecasts, scores, gates."""
