"""What a training run writes: checkpoints, the trained weights, and which launch may write."""
