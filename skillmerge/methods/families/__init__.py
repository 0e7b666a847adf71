"""The methods that expressions can call. One module for each family."""
