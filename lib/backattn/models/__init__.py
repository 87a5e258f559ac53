"""A decoder, opened up."""
