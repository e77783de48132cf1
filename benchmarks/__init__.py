"""Measurements of ganscale against its rivals, and of one run against itself on other clusters."""
