"""Rows as training writes them, for the tests of this folder."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

MakeRun = Callable[..., Path]
"""The fixture `make_run`: (name, loss=, rows=, grids=) to a run folder."""


def row(number: int, loss: str) -> dict[str, Any]:
    """A row of metrics.jsonl; `loss` only bends its curves."""
    bend = len(loss) / 5
    return {
        "progress/images_seen": number * 640,
        "progress/step": number * 5,
        "loss/critic": -bend * math.exp(-number / 10) + 0.01 * math.sin(number * 12.9898),
        "loss/generator": bend * math.cos(number / 7),
        "logits/real_mean": bend + 1 / number,
        "logits/fake_mean": -bend + 1 / number,
        "panel/critic/wgan": -2 * bend / number,
        "panel/critic/hinge": 2 - bend / number,
        "panel/generator/wgan": bend / number,
        "panel/generator/hinge": 0.1 * number,
        "optim/critic_learning_rate": 5e-4,
        "perf/images_per_second": 1280.0,
    }
