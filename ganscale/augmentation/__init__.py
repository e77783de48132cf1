"""What stands before the critic: augmentation pipelines and the adaptive controller."""
