"""Planned memory and files are those of a state that has really been trained."""

import gc
import json
import math
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from ganscale.data.batch import Batch, allocate_batch
from ganscale.data.dataset import open_data
from ganscale.data.loader_process import LoaderProcess, LoaderThread, start_loader
from ganscale.data.manifest import Manifest
from ganscale.data.order import Order
from ganscale.objectives.objective import build_objective
from ganscale.plan.planning import checkpoint_positions, make_plan
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.cycle import Cycle
from ganscale.training.device_prefetcher import DevicePrefetcher
from ganscale.training.state import TrainingState
from tests.checkpoints.helpers import save_checkpoint
from tests.plan.conftest import config_of, config_of_mlps

NETWORKS = {
    "adam": [],
    "rmsprop": [
        "optimizer.critic.name=rmsprop",
        "optimizer.critic.momentum=0.5",
        "optimizer.generator.name=rmsprop",
        "ema.half_life_images=0",
    ],
    "sgd": ["optimizer.critic.name=sgd", "optimizer.generator.name=sgd"],
    "float64": ["training.precision=float64"],
    "classes": [
        "training.conditional=true",
        "generator.target=resnet",
        "critic.target=resnet",
    ],
}


def trained(config: Config, num_classes: int) -> tuple[TrainingState, Cycle]:
    """After one cycle on one rank."""
    objective = build_objective(config.objective)
    runtime = Runtime.start()
    state = TrainingState(config, objective, runtime, num_classes)
    cycle = Cycle(config, objective, runtime, state)
    batch = config.training.global_batch_size
    images = torch.zeros(batch, *config.data.size, 1).byte()
    labels = torch.arange(batch) % max(1, num_classes)
    cycle.run([Batch(images, labels, slots=torch.arange(batch))], is_logged=True)
    return state, cycle


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_checkpoint_and_device_bytes_are_those_of_a_trained_state(digits, tmp_path, settings):
    config = config_of(digits, *settings)
    plan = make_plan(config, nodes=1, gpus_per_node=1).networks
    state, _ = trained(config, 10 if config.training.conditional else 0)
    folder = save_checkpoint(tmp_path, 16, state.files(), state.numbers())
    written = {path.name: path.stat().st_size for path in folder.iterdir()}
    tensors = sum(size for name, size in written.items() if name.endswith(".safetensors"))
    assert plan.checkpoint_bytes == tensors
    assert sum(written.values()) - tensors < 10_000  # plain numbers, however large the networks

    networks = [state.generator, state.critic, state.ema]
    held = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    held += [p.grad for network in networks for p in network.parameters() if p.grad is not None]
    for updater in (state.generator_updater, state.critic_updater):
        held += updater.optimizer.tensors().values()
    assert plan.device_bytes == sum(t.nbytes for t in held if t is not None)
    count = sum(p.numel() for p in state.generator.parameters())
    assert plan.generator_parameters == count


def decoded_elsewhere(loader: object) -> int:
    """Batches in the memory that is shared with another process: in pages that were written to."""
    if not isinstance(loader, LoaderProcess):
        return 0
    files = Path(f"/proc/{loader._process.pid}/fd").iterdir()
    memory = next(file for file in files if "ganscale batches" in str(file.readlink()))
    return round(512 * memory.stat().st_blocks / math.prod(loader._shape))


def own_bytes_elsewhere(loader: object) -> int:
    """Resident in another process, without what it maps from files or shares."""
    if not isinstance(loader, LoaderProcess):
        return 0
    status = Path(f"/proc/{loader._process.pid}/status").read_text()
    (kibibytes,) = re.findall(r"RssAnon:\s+(\d+) kB", status)
    return int(kibibytes) << 10


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_rank_holds_as_many_batches_as_planned(digits, workers):
    config = config_of_mlps(digits, f"data.workers={workers}", "objective.n_critic=3")
    plan = make_plan(config, nodes=1, gpus_per_node=1).host_memory
    loader = start_loader(
        open_data(config.data),
        allocate_batch,
        3,
        seed=0,
        global_batch_size=16,
        rank=0,
        world_size=1,
        position=0,
    )
    prefetcher = DevicePrefetcher(loader, Runtime.start(), 3)
    try:
        prefetcher.prefetch(lambda: False)
        for _ in range(3):
            batches = prefetcher.take()  # kept while the next ones are fetched, as the loop does
            prefetcher.prefetch(lambda: False)
            assert len(batches) == 3
        if isinstance(loader, LoaderThread):
            loader._requested[-1].result(timeout=300)
        else:
            time.sleep(2)  # it fills what it was asked for
        gc.collect()
        alive = {
            each.images.data_ptr(): (each.images.nbytes, each.labels.nbytes, each.slots.nbytes)
            for each in gc.get_objects()
            if type(each) is Batch
        }
        each_bytes = sum(next(iter(alive.values())))
        assert plan.batches == len(alive) + decoded_elsewhere(loader)
        assert plan.batches_bytes == plan.batches * each_bytes
        assert plan.loader_bytes == pytest.approx(own_bytes_elsewhere(loader), rel=0.3)
    finally:
        loader.close()


def test_tables_of_a_rank_take_the_bytes_that_are_planned(digits, tmp_path):
    """Measured with Python's own tracing of allocations, for a manifest of 3,000 shards."""
    described = json.loads((digits / "manifest.json").read_text())
    shard = described["shards"][0]
    described["shards"] = [
        {**shard, "name": f"shard-{i:06d}.tar", "sha256": f"{i:064x}", "samples": 1}
        for i in range(3000)
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(described))
    np.save(tmp_path / "manifest.npy", np.load(digits / "manifest.npy")[:3000])
    config = config_of_mlps(tmp_path, "data.lanes=4", "data.block_samples=50", "data.workers=2")
    plan = make_plan(config, nodes=1, gpus_per_node=1).host_memory
    rows_file = (tmp_path / "manifest.npy").stat().st_size
    assert plan.manifest_bytes == pytest.approx(rows_file, abs=256)  # but for its header

    def allocated(make):
        gc.collect()
        tracemalloc.start()
        kept = make()
        gc.collect()
        found = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return found, kept

    shards, manifest = allocated(lambda: Manifest.load(tmp_path))
    assert plan.shard_list_bytes == pytest.approx(2 * shards, rel=0.1)  # two processes

    def read_order():
        order = Order(
            np.diff(manifest.first_sample),
            seed=0,
            fingerprint="",
            lanes=4,
            block_samples=50,
            window_blocks=config.data.window_blocks,
        )
        for first in range(0, order.epoch_length, 100):
            order.samples(first + np.arange(100))
        return order

    tables, _ = allocated(read_order)
    assert plan.order_bytes == pytest.approx(tables, rel=0.25)


@pytest.mark.parametrize(("every", "total"), [(32, 160), (50, 500), (7, 100), (1000, 90)])
def test_checkpoints_are_counted_as_the_loop_writes_them(digits, every, total):
    config = config_of(digits, f"checkpoint.every_images={every}", f"training.total_images={total}")
    seen, saved = 0, []
    while seen < total:  # cycles of two critic steps with 16 images
        before, seen = seen, seen + 32
        if seen // every > before // every or seen >= total:
            saved.append(seen)
    assert checkpoint_positions(config).tolist() == saved
