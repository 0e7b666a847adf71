"""What the files of tokenizers say: which id is which token, and how text becomes tokens."""
