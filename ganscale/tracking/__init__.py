"""What a run logs while it trains: to a local record, Weights & Biases and the console."""
