"""Back attention and what it must beat."""
