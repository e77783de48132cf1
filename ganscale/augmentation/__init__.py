"""Augmentation of what the critic sees: augmentation pipelines and the adaptive controller."""
