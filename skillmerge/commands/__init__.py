"""The commands of the command line, by what they are for: each parses, calls a verb, and reports."""
