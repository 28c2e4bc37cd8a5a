"""What a decoded sample is worth."""
