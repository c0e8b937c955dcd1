"""The training loop and its parts, over Accelerate."""
