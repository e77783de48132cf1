"""What a run reports while it trains: to a local record, Weights & Biases and the console."""

from ganscale.tracking.console import Console, setup_logging
from ganscale.tracking.record import Record, read_rows
from ganscale.tracking.tracker import Tracker

__all__ = ["Console", "Record", "Tracker", "read_rows", "setup_logging"]
