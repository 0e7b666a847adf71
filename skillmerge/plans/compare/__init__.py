"""Compares what a formula's models say about themselves, before any weight is read; one module for each subject."""
