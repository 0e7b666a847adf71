"""The sources of named tensors. A `Store` gives the bytes of files; a `Checkpoint` gives tensors, however they are
stored; a `Kind` says which bytes of which files a tensor is made of, and `schemes` what reads which URI."""
