"""The commands that a user types: each module reads arguments and calls the layer that does it."""
