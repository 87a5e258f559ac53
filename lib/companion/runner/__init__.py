"""Running and checking the notebooks."""
