"""What a training run is, and its results."""
