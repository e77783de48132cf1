"""One HTML page of a run, or of several compared: curves, samples, faults and settings."""

from ganscale.report.page import render
from ganscale.report.run_reader import Run, read_runs

__all__ = ["Run", "read_runs", "render"]
