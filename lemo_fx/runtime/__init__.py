"""What runs in a training step of a rewritten model."""
