"""The version of this package, where everything below `skillmerge` itself can import it."""

__version__ = "0.9.0"
