"""One file or folder per notebook, bearing its name."""
