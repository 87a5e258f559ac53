"""02: why two-hop questions fail."""
