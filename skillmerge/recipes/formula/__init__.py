"""The expression of a recipe: its text, its tree, its terms."""
