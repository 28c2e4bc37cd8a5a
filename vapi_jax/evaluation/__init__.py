"""What images are worth: features, metrics, receipts, and the comparison at equal entropy."""
