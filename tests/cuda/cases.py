"""What ranks of their own record for the tests here."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.invariance import Combination, Record, config_of, few_combinations, record
from ganscale.runtime import Runtime
from ganscale.schema import Config, PenaltyConfig

Records = dict[str, Record]

PENALTY_PRECISIONS = {
    "float64": ("float64", "float32"),  # a penalty is never less precise than the rest
    "bfloat16, penalty in float32": ("bfloat16", "float32"),
    "bfloat16 throughout": ("bfloat16", "autocast"),
}


def record_cycles(folder: Path) -> None:
    """Saves the Records of every case to `records.pt`. The environment variable BACKEND is that of
    the process group, which otherwise follows from the device."""
    torch.set_num_threads(1)
    if "BACKEND" in os.environ:
        dist.init_process_group(os.environ["BACKEND"])
    runtime = Runtime.start(timeout_seconds=60)
    found = {name: record(config, runtime) for name, config in configs().items()}
    if runtime.is_main:
        on_cpu = {
            name: {
                kind: {key: tensor.cpu() for key, tensor in tensors.items()}
                for kind, tensors in each.items()
            }
            for name, each in found.items()
        }
        torch.save(on_cpu, folder / "records.pt")
    runtime.close()


def configs() -> dict[str, Config]:
    found = {
        f"{combination.name}/{precision}": config_of(combination, 1, precision)
        for precision, step in (("float64", 1), ("float32", 3))
        for combination in few_combinations()[::step]
    }
    return found | {name: _penalty_config(*pair) for name, pair in PENALTY_PRECISIONS.items()}


def _penalty_config(precision: str, penalty_precision: str) -> Config:
    """Its first critic gradient is that of the penalty: the loss weighs next to nothing."""
    config = config_of(Combination("hinge", "r1"), 1, precision)
    config.training.penalty_precision = penalty_precision
    config.objective.penalties = {"r1": PenaltyConfig(1e8)}
    return config
