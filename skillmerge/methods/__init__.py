"""The arithmetic of a merge: terms, what they compile to, their evaluation and rounding. Knows no files."""
