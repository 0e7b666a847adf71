"""Where named tensors come from. A `Store` gives the bytes of files; a `Checkpoint` gives tensors, whatever they are
stored as; a `Kind` says which bytes of which files a tensor is made of, and `schemes` what reads which URI."""
