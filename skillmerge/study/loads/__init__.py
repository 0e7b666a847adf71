"""A finished model in the runtimes that people serve it with, each in a process of its own."""
