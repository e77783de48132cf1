"""What is measured of a training cycle: losses, logits, gradients, time and collapse."""
