"""The commands by subject: each reads its options, calls its verb, and shows the result."""
