"""Train GANs on one CPU, eight GPUs or a cluster, with the same command and the same result."""

__version__ = "0.1.0"
