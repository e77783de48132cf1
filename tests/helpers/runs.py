"""Real training processes on the bundled digits."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ganscale.tracking.record import parse_row
from tests.helpers.processes import REPOSITORY
from tests.helpers.ranks import Ranks

# A whole run in a few seconds: the demo's networks, smaller, a row at every generator step, no
# evaluations, and no process for its data, which would take a second to start. Where these matter,
# tests ask for them.
TINY = [
    str(REPOSITORY / "configs" / "demo.yaml"),
    "generator.options.width=4",
    "critic.options.width=4",
    "objective.n_critic=2",
    "training.global_batch_size=16",
    "log.every_images=32",
    "log.wandb=disabled",
    "data.workers=0",
    "samples.count=4",
    "evaluation.every_images=0",
    "checkpoint.best=''",
]

# Everything that can have one in a run with WGAN-GP, with its end within a short run.
SCHEDULES = (
    "optimizer.critic.learning_rate={from: 1e-3, to: 2e-4, over_images: 1k}",
    "optimizer.generator.learning_rate={from: 1e-3, to: 0, warmup_images: 200}",
    "optimizer.critic.betas=[0, {from: 0.9, to: 0.99, over_images: 1k}]",
    "optimizer.generator.betas=[{from: 0.5, to: 0, over_images: 1k}, 0.9]",
    "objective.penalties.wgan_gp.weight={from: 10, to: 1, shape: linear}",
    "augmentation={pipeline: ada, probability: {from: 0, to: 0.8, over_images: 1k}}",
    "ema={half_life_images: {from: 0, to: 500, over_images: 1k}, ramp_up: 1}",
)

# The metrics that show them.
SCHEDULED = {
    "optim/critic_learning_rate",
    "optim/generator_learning_rate",
    "optim/critic_beta2",
    "optim/generator_beta1",
    "penalty/wgan_gp_weight",
    "augment/probability",
    "optim/ema_half_life_images",
}


_OPTIONS = {
    "r3gan": "{widths: 8, group_width: 4, bfloat16_stages: 2}",
    "stylegan2": "{widths: 4, mapping_layers: 2, bfloat16_stages: 2}",
}


def with_networks(target: str, settings: Sequence[str]) -> list[str]:
    """The same run with small networks, partly in bfloat16 unless it is in float64."""
    others = [setting for setting in settings if not setting.endswith(".options.width=4")]
    networks = [f"{role}.target={target}" for role in ("generator", "critic")]
    networks += [f"{role}.options={_OPTIONS[target]}" for role in ("generator", "critic")]
    return [*others, *networks]


# The least that a config must say.
MINIMAL = """
data: {path: data/x, resolution: 8}
generator: {target: mlp}
critic: {target: mlp}
objective: {loss: {name: wgan}}
optimizer: {critic: {learning_rate: 1e-4}, generator: {learning_rate: 1e-4}}
training: {total_images: 50k}
"""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The undamaged rows of a record."""
    rows = map(parse_row, path.read_bytes().splitlines(keepends=True))
    return (row for row in rows if row is not None)


class Runs:
    """Runs in one folder, and the processes that train them."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.networks = ""  # a target of `with_networks`
        self._data = data

    def settings(self, name: str, *settings: str) -> list[str]:
        where = [f"run.folder={self.folder}", f"run.name={name}", f"data.path={self._data}"]
        every = [*TINY, *where, *settings]
        return with_networks(self.networks, every) if self.networks else every

    def command(self, name: str, *settings: str, ranks: int = 1) -> list[str]:
        program = [sys.executable, "-m", "ganscale", "train"]
        if ranks > 1:
            program = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes"]
            program += [str(ranks), "--config_file", str(REPOSITORY / "launch" / "cpu.yaml")]
            program += ["--main_process_port", "0", str(REPOSITORY / "launch" / "train.py")]
        return [*program, *self.settings(name, *settings)]

    def start(self, name: str, *settings: str, ranks: int = 1) -> subprocess.Popen[str]:
        """As a user would. One thread per rank: another number sums in another order."""
        return subprocess.Popen(
            self.command(name, *settings, ranks=ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        )

    def finish(
        self,
        name: str,
        *settings: str,
        ranks: int = 1,
        exit_code: int = 0,
        environment: Mapping[str, Any] = {},
    ) -> str:
        """Trains to the end, without a launcher; what all ranks printed."""
        processes = Ranks(self, ranks, *settings, name=name, **environment)
        try:
            exit_codes = processes.exit_codes(*range(ranks))
            printed = "".join(map(processes.printed, range(ranks)))
        finally:
            processes.end()
        assert exit_codes == [exit_code] * ranks, f"{exit_codes}: {printed}"
        return printed

    def rows(self, name: str) -> list[dict]:
        """The rows of metrics.jsonl that have losses."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss/critic" in row]

    def summary(self, name: str) -> dict:
        return json.loads((self.folder / name / "summary.json").read_text())

    def checkpoints(self, name: str) -> list[Path]:
        return sorted((self.folder / name / "checkpoints").glob("images-*"))


def checkpoint_bits(checkpoint: Path) -> dict[str, bytes]:
    """The bits of every tensor of a checkpoint."""
    from safetensors.torch import load_file

    return {
        f"{file.stem}.{name}": tensor.numpy().tobytes()
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
