"""Faults on purpose, and what a run has to show for it afterwards."""
