"""What cycles on the CPU really need, for test_device_memory.py.

    python -m tests.plan.cycle_memory BATCH CONFIG|key=value...

prints by how many bytes they make a process grow that has run such cycles with two images before.
"""

import gc
import json
import re
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.launches import gpu_path
from benchmarks.ours import config_of
from ganscale import runtime as runtime_module
from ganscale.config import resolve
from ganscale.data.batch import Batch
from ganscale.networks.dcgan import DCGANCritic
from ganscale.networks.resnet import ResNetCritic
from ganscale.objectives.objective import build_objective
from ganscale.plan.live_bytes import LiveBytes
from ganscale.randomness import draw_together
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.cycle import Cycle
from ganscale.training.data_flow import batches_per_cycle
from ganscale.training.device_batch import draws_ahead
from ganscale.training.network_setup import build_unchecked_networks
from ganscale.training.state import TrainingState


class CheckpointedCritic(ResNetCritic):
    """Repeats the forwards of its blocks in the backward."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        features = images
        for block in self.blocks:
            features = checkpoint(block, features, use_reentrant=False)
        return self.output(features.mean((2, 3))).squeeze(1)


class AskingCritic(DCGANCritic):
    """Depends on values, which the meta device does not have."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(images / images.abs().max().item())


def small_config(objective: str, network: str, *settings: str) -> Config:
    """As benchmarks.ours.config_of, with a width of 16 and a batch of 32; or a ready config, with
    the same batch."""
    if network.startswith("r3gan_"):
        pieces = [network, objective, "data.path=x", "training.global_batch_size=32"]
        return resolve([*pieces, *settings]).config
    widths = [f"{role}.options.width=16" for role in ("generator", "critic")]
    return config_of(objective, network, 32, "data.path=x", *widths, *settings)


def run_cycles(config: Config, runtime: Runtime, classes: int = 0) -> None:
    """Three logged cycles on noise, while the batches of the next are there already."""
    objective = build_objective(config.objective)
    networks = build_unchecked_networks(config, classes)
    state = TrainingState(config, objective, runtime, classes, networks)
    cycle = Cycle(config, objective, runtime, state)
    global_batch, count = config.training.global_batch_size, batches_per_cycle(config)
    images, size = global_batch // runtime.world_size, config.data.size
    first = runtime.rank * images

    def batches(cycle: int) -> list[Batch]:
        made = []
        for step in range(cycle * count, (cycle + 1) * count):
            slots = step * global_batch + first + torch.arange(images)
            pixels = torch.randint(0, 256, (images, *size, config.data.channels)).byte()
            draws = draw_together(draws_ahead(config, objective), config.seed, slots)
            made.append(Batch(pixels, slots % max(1, classes), slots, draws=draws))
        return made

    following = batches(0)
    for number in range(3):
        current, following = following, batches(number + 1)
        cycle.run(current, is_logged=True)
        state.meters.read()


def tracked_peak(config: Config, runtime: Runtime, classes: int = 0) -> int:
    """The bytes of the tensors that exist at the same time, computed as on a GPU."""
    gc.collect()
    with gpu_path(), LiveBytes() as live:
        run_cycles(config, runtime, classes)
    return live.peak


def run(folder: Path) -> None:
    """On several ranks."""
    torch.set_num_threads(1)
    runtime = Runtime.start(timeout_seconds=300)
    cases = json.loads((folder / "cases.json").read_text())
    found = {name: tracked_peak(small_config(*each), runtime) for name, each in cases.items()}
    if runtime.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    runtime.close()


def resident_bytes(name: str) -> int:
    """name: VmRSS, or VmHWM for its peak"""
    (kibibytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) << 10


def main() -> None:
    torch.set_num_threads(1)
    batch, *settings = sys.argv[1:]
    # A peak of tensors, not of the holes between them: what is freed goes back to the system.
    with patch.object(runtime_module, "keep_freed_memory"):
        runtime = Runtime.start()
    for images in ("2", batch):
        config = resolve([*settings, f"training.global_batch_size={images}"]).config
        gc.collect()
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # lowers the peak to what is resident
        run_cycles(config, runtime)
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
