"""What is said of a merge by layer and module from sums that were kept per tensor."""
