"""What an evaluation costs beside the bare forward of the generator and of the feature network.

    python -m benchmarks.evaluation [--quick] [--json FILE]

The default metrics and network (Fréchet distances of EfficientNet-Lite0's features) of a DCGAN of
width 64 at 32 pixels, on one rank and on two, with one thread each. "Bare" are the same forwards of
the same batches, whose images and features are dropped. Both take turns. The reference is known, as
it is from a run's second evaluation on; the feature network is loaded anew, as it is each time.

The ratio is in percent of the bare forward's processor time, summed over the ranks, beyond it: the
median over rounds; low and high are its quartiles. The note has seconds of processor time.
"""

import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.ours import config_of
from benchmarks.ranks import run_ranks
from benchmarks.report import Row, arguments, report
from benchmarks.timing import interleaved, spread
from ganscale.cli.main import main as ganscale
from ganscale.data.dataset import open_data
from ganscale.evaluation.evaluator import Evaluator
from ganscale.evaluation.feature_networks.build import build_feature_network
from ganscale.evaluation.images import GeneratedImages
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.schema import EvaluationConfig
from ganscale.training.network_setup import build_networks

WORLD_SIZES = 1, 2
_LIMIT_SECONDS = 1800.0


def measure(folder: Path) -> None:
    """On every rank; rank 0 writes the processor seconds of each round to `seconds.json`."""
    asked = json.loads((folder / "asked.json").read_text())
    count, rounds = asked["samples"], asked["rounds"]
    runtime = Runtime.start()
    settings = (f"data.path={folder / 'data'}", f"data.cache={folder / 'cache'}")
    config = config_of("non_saturating", "dcgan32", 64, *settings)
    objective = build_objective(config.objective)
    generator, _ = build_networks(config, objective, 0, runtime.device)
    images = GeneratedImages(generator, 0, count, config.generator.latent_dim, None)
    evaluation = EvaluationConfig(samples=count)
    evaluator = Evaluator(evaluation, config.data, open_data(config.data).manifest, runtime)
    network = build_feature_network(
        evaluation.network,
        {},
        device=runtime.device,
        sample_shape=config.data.sample_shape,
        cache=folder / "cache",
        retry_seconds=0,
    )
    size = evaluation.batch_size

    def bare() -> None:
        with torch.no_grad():
            for first in range(runtime.rank * size, count, runtime.world_size * size):
                network(images.chunk(range(first, min(first + size, count))).images)

    def evaluate() -> None:
        evaluator.evaluate(images, lambda: False, lambda *_: None)

    contestants = {"bare": bare, "evaluation": evaluate}
    seconds = interleaved(contestants, rounds, warm_up=1, clock=time.process_time)
    summed = {name: runtime.all_reduce_sum(torch.tensor(each)) for name, each in seconds.items()}
    if runtime.is_main:
        text = json.dumps({name: each.tolist() for name, each in summed.items()})
        (folder / "seconds.json").write_text(text)
    runtime.close()


def row_of(world_size: int, samples: int, rounds: int, folder: Path) -> Row:
    asked = {"samples": samples, "rounds": rounds}
    (folder / "asked.json").write_text(json.dumps(asked))
    run_ranks("benchmarks.evaluation:measure", folder, world_size, _LIMIT_SECONDS)
    seconds = json.loads((folder / "seconds.json").read_text())
    pairs = zip(seconds["evaluation"], seconds["bare"], strict=True)
    ratio, low, high = spread([100 * (whole / bare - 1) for whole, bare in pairs])
    bare, whole = (sorted(seconds[name])[rounds // 2] for name in ("bare", "evaluation"))
    name = f"{samples:,} samples on {world_size} rank{'s' * (world_size > 1)}"
    note = f"{whole:.1f} s, bare {bare:.1f} s"
    return Row(name, "bare forward", ratio, low, high, "% more", note)


def main() -> None:
    options = arguments(__doc__)
    samples, rounds = (2000, 3) if options.quick else (20_000, 5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if ganscale(["shards", "write", "bundled:emoji", str(folder / "data")]) != 0:
            raise SystemExit(1)
        rows = [row_of(world_size, samples, rounds, folder) for world_size in WORLD_SIZES]
    report(rows, options.json)


if __name__ == "__main__":
    main()
