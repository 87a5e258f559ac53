"""Training adapters and small models."""
