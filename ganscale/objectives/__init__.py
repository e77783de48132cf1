"""What the two networks minimise: adversarial losses, gradient penalties and weight clipping."""
