"""Loading a finished model in runtimes, each in a separate process."""
