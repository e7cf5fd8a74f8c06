"""Training: optimizer, step, checkpoints, metrics and the loop that joins them."""
