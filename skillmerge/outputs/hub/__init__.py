"""A finished output on the Hub: its card, its commit, and the push."""
