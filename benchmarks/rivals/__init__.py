"""Training loops that people use instead of ganscale, with copies of the same networks.

Losses and penalties are written again from their papers, so that rivals use nothing of ganscale;
`tests/test_benchmarks.py` compares the two.
"""
