"""Training loops that people use instead of ganscale's, around copies of the same networks.

Losses and penalties are written from their papers once more, so that nothing of ganscale is on the
rivals' side; `tests/test_benchmarks.py` holds them against each other.
"""
