"""Checkpoints: written completely or not at all, verified before loading, pruned as configured."""
