"""Run folders as one HTML page: curves, samples, faults and settings; several runs compared."""

from ganscale.report.page import render
from ganscale.report.run_reader import Run, read_runs

__all__ = ["Run", "read_runs", "render"]
