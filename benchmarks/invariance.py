"""A run does not depend on its cluster: all objectives on 1, 2 and 4 ranks, accumulating or not.

    python -m benchmarks.invariance [--quick] [--json FILE]

Each row trains tiny networks for a few cycles, with the steps of a real run, and compares
everything with one process that takes the whole batch at once: the gradients of every update, the
final weights, buffers, optimizer moments and EMA, and all logged values, including the panel. All
ranks must also end with the same bits.

`ratio` is the largest error: max |a - b| / max |b| over each kind (a network's gradient at one
update, its weights, its second moments), and for a logged value relative to itself or to 1. It is
not taken over each tensor, because some gradients cancel except for rounding, such as that of a
Wasserstein critic's last bias. For the same reason Adam's epsilon is large: with the usual 1e-8,
gradients of rounding would become whole steps.

A batch norm connects the images of a micro-batch, so runs with two micro-batches are compared with
one process that has two.

A row of the adaptive controller fails, too, if its probability stays where it starts, or at 0.

The exit code is 1 if a row exceeds its tolerance.
"""

import copy
import hashlib
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ranks import run_ranks
from benchmarks.report import Row, arguments, report
from ganscale.data.batch import Batch
from ganscale.data.order import batch_positions
from ganscale.evaluation.sampling import generate_images, sample_labels, sample_latents
from ganscale.networks.batch_groups import up_to_whole_groups
from ganscale.objectives.losses import LOSSES
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import PENALTIES
from ganscale.randomness import random_words
from ganscale.runtime import Runtime
from ganscale.schedules import Schedule, value_at
from ganscale.schema import (
    AdaptiveConfig,
    AugmentationConfig,
    ClipConfig,
    Config,
    CriticConfig,
    DataConfig,
    EMAConfig,
    GeneratorConfig,
    GeneratorPenaltyConfig,
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    OptimizersConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.training.cycle import Cycle
from ganscale.training.data_flow import data_position
from ganscale.training.metrics_row import metrics_row
from ganscale.training.network_setup import build_unchecked_networks
from ganscale.training.state import TrainingState

TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
WORLD_SIZES = (1, 2, 4)
ACCUMULATE = (1, 2)
GLOBAL_BATCH, CYCLES, N_CRITIC = 8, 2, 2
RESOLUTION, CHANNELS, CLASSES, LANES = 8, 2, 3, 4

# All tensors, by kind (such as the gradients of one update) and by name within it.
Record = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Variant:
    """The other settings of a combination, besides its loss and penalties."""

    critic: dict[str, Any] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)
    clip: ClipConfig | None = None
    optimizer: str = "adam"
    gradient_clip: float = 0.0
    is_conditional: bool = False
    flip: bool = False
    generator_real: str = "critic"
    generator_penalties: dict[str, GeneratorPenaltyConfig] = field(default_factory=dict)
    network: str = ""  # that both roles have instead of the tiny ones
    resolution: int = RESOLUTION
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    batch: int = GLOBAL_BATCH
    channels: int = CHANNELS
    seed: int = 0
    is_scheduled: bool = False  # learning rates, betas, weights of penalties, half-life of the EMA


_ALL_OF_ADA = dict.fromkeys(["blit", "geom", "color", "filter", "noise", "cutout"], 1.0)
_OF_R3GAN = {"blit": 1.0, "geom": 1.0, "color": 0.5, "cutout": 1.0}
VARIANTS = {
    "plain": Variant(),
    "layer_norm": Variant(critic={"norm": "layer"}),
    "instance_norm": Variant(critic={"norm": "instance"}),
    "spectral_norm": Variant(critic={"norm": "spectral"}),
    "no_final_bias": Variant(critic={"final_bias": False}),
    "patches": Variant(critic={"patches": True}),
    "batch_norm": Variant(generator={"norm": "batch"}),
    "spectral_generator": Variant(generator={"norm": "spectral"}),
    "conditional": Variant(is_conditional=True),
    "gradient_clip": Variant(gradient_clip=0.1),
    "flip": Variant(flip=True),
    "ada": Variant(augmentation=AugmentationConfig("ada", _ALL_OF_ADA, 0.7)),
    "diffaugment": Variant(augmentation=AugmentationConfig("diffaugment", probability=1.0)),
    "draws": Variant(critic={"draws": True}, generator={"draws": True}),
    "checkpointed_draws": Variant(
        critic={"draws": True, "checkpoints": True}, generator={"draws": True, "checkpoints": True}
    ),
    "path_length": Variant(
        generator_penalties={"path_length": GeneratorPenaltyConfig(2.0, decay=0.5)},
        is_conditional=True,
    ),
    # Noise, style mixing, a mapping of the class, groups.
    "stylegan2": Variant(
        network="stylegan2",
        resolution=16,
        generator={"widths": 4, "style_dim": 6, "mapping_layers": 2},
        critic={"widths": 4, "mapping_layers": 2},
        generator_penalties={"path_length": GeneratorPenaltyConfig(2.0)},
        augmentation=AugmentationConfig(
            "ada", probability=0.5, adaptive=AdaptiveConfig(0.3, every_images=8, full_images=160)
        ),
        is_conditional=True,
        batch=4 * GLOBAL_BATCH,
    ),
    # Everything of R3GAN at once, and each of its numbers on its way to another.
    "r3gan": Variant(
        network="r3gan",
        resolution=16,
        channels=3,
        generator={"widths": [8, 8, 4], "group_width": 4},
        critic={"widths": [8, 8, 4], "group_width": 4},
        generator_real="fresh",
        augmentation=AugmentationConfig("ada", _OF_R3GAN, Schedule(0.3, 0.9, 3 * GLOBAL_BATCH)),
        is_scheduled=True,
        is_conditional=True,
        flip=True,
    ),
    "fresh_real": Variant(generator_real="fresh", is_conditional=True, flip=True),
    # Real logits of both signs, so that the probability goes down and up again.
    "adaptive": Variant(
        augmentation=AugmentationConfig(
            "ada", probability=0.9, adaptive=AdaptiveConfig(0.1, every_images=8, full_images=40)
        ),
        seed=2,
    ),
    # A batch that four ranks of two micro-batches divide into whole groups. The deviation of a pair
    # has nearly a kink where its images agree, at which float32 loses digits.
    "groups": Variant(critic={"group_size": 4}, is_conditional=True, batch=4 * GLOBAL_BATCH),
    # For losses that ignore a shift of the logits, gradients of biases are only rounding. If biases
    # were clipped, chance would decide whether they count as at the bound.
    "clip_weights": Variant(clip=ClipConfig(0.1, "weights"), optimizer="rmsprop"),
    "clip_all": Variant(clip=ClipConfig(0.1, "all"), optimizer="rmsprop"),
}

WEIGHTS = {"wgan_gp": 10.0, "wgan_lp": 10.0, "dragan": 10.0, "wgan_gp_pixel": 0.1}
PENALTY_SETS: dict[str, dict[str, PenaltyConfig]] = {
    "none": {},
    **{name: {name: PenaltyConfig(WEIGHTS.get(name, 1.0))} for name in PENALTIES},
    "r1+r2": {"r1": PenaltyConfig(1.0), "r2": PenaltyConfig(1.0)},
    "lazy_r1": {"r1": PenaltyConfig(1.0, interval=3)},
}


@dataclass(frozen=True)
class Combination:
    loss: str
    penalties: str
    variant: str = "plain"

    @property
    def name(self) -> str:
        suffix = "" if self.variant == "plain" else f"/{self.variant}"
        return f"{self.loss}/{self.penalties}{suffix}"


def combinations() -> list[Combination]:
    """Every loss with every set of penalties on plain networks, and three with every variant."""
    plain = [Combination(*pair) for pair in itertools.product(LOSSES, PENALTY_SETS)]
    varied = [Combination(*pair, variant) for pair in THREE for variant in FREE]
    return plain + varied + CLIPPED + ADAPTIVE + FRESH


def few_combinations() -> list[Combination]:
    """A subset in which every loss, every set of penalties and every variant occurs."""
    pairs = itertools.product(enumerate(LOSSES), enumerate(PENALTY_SETS))
    plain = [
        Combination(loss, penalties) for (i, loss), (j, penalties) in pairs if (i + j) % 5 == 0
    ]
    in_turn = zip(itertools.cycle(THREE), FREE)
    varied = [Combination(*pair, variant) for pair, variant in in_turn]
    return plain + varied + CLIPPED + ADAPTIVE + FRESH


THREE = [("wgan", "wgan_gp"), ("hinge", "dragan"), ("relativistic_average", "r1+r2")]
FREE = [
    name
    for name, variant in VARIANTS.items()
    if name not in ("plain", "fresh_real", "adaptive", "stylegan2", "r3gan") and not variant.clip
]
CLIPPED = [
    Combination("wgan", "none", "clip_weights"),
    Combination("relativistic_average", "none", "clip_weights"),
    Combination("lsgan", "none", "clip_all"),
]
# For losses to which the sign of a logit means something.
ADAPTIVE = [
    Combination("hinge", "r1", "adaptive"),
    Combination("non_saturating", "lazy_r1", "adaptive"),
    Combination("non_saturating", "lazy_r1", "stylegan2"),
]
# For losses whose generator needs real images.
FRESH = [
    Combination("relativistic", "r1+r2", "fresh_real"),
    Combination("relativistic_average", "wgan_gp_pixel", "fresh_real"),
    Combination("relativistic", "r1+r2", "r3gan"),
]


def config_of(combination: Combination, accumulate: int, precision: str) -> Config:
    """A run of a few cycles."""
    variant = VARIANTS[combination.variant]

    def moving(start: float, end: float) -> float | Schedule:
        """The start, or in a variant with schedules the way to the end."""
        return Schedule(start, end, 3 * GLOBAL_BATCH) if variant.is_scheduled else start

    half_life = Schedule(0, 10, 3 * GLOBAL_BATCH) if variant.is_scheduled else 50
    betas = [moving(0.5, 0.0), moving(0.9, 0.99)]
    optimizer = OptimizerConfig(variant.optimizer, moving(5e-3, 1e-3), betas=betas, eps=1e-2)
    generator = "TinyStyleGenerator" if variant.generator_penalties else "TinyGenerator"
    generator, critic = (
        variant.network or f"benchmarks.tiny_networks:{name}" for name in (generator, "TinyCritic")
    )
    penalties = {
        name: replace(each, weight=moving(value_at(each.weight, 0), 0.1))
        for name, each in PENALTY_SETS[combination.penalties].items()
    }
    return Config(
        seed=variant.seed,
        data=DataConfig(
            "",
            resolution=variant.resolution,
            channels=variant.channels,
            flip=variant.flip,
            lanes=LANES,
        ),
        generator=GeneratorConfig(generator, 6, variant.generator),
        critic=CriticConfig(critic, variant.critic),
        objective=ObjectiveConfig(
            LossConfig(combination.loss),
            penalties,
            variant.generator_penalties,
            clip=variant.clip,
            n_critic=N_CRITIC,
        ),
        augmentation=copy.deepcopy(variant.augmentation),
        optimizer=OptimizersConfig(optimizer, optimizer),
        training=TrainingConfig(
            total_images=CYCLES * N_CRITIC * variant.batch,
            global_batch_size=variant.batch,
            accumulate=accumulate,
            precision=precision,
            conditional=variant.is_conditional,
            gradient_clip=variant.gradient_clip,
            generator_real=variant.generator_real,
        ),
        ema=EMAConfig(half_life, ramp_up=1.0),
    )


def record(config: Config, runtime: Runtime, *, tries_networks: bool = False) -> Record:
    """Trains from the start to the end of `config`, and what there was to see.

    tries_networks: before that, as a run does with networks that it does not know
    """
    objective = build_objective(config.objective)
    num_classes = CLASSES if config.training.conditional else 0
    networks = None if tries_networks else untried_networks(config, num_classes, runtime)
    state = TrainingState(config, objective, runtime, num_classes, networks)
    cycle = Cycle(config, objective, runtime, state)
    found: Record = {}
    while state.images_seen < config.training.total_images:
        seen, size = state.images_seen, config.training.global_batch_size
        first, stop = (data_position(config, each) for each in (seen, seen + cycle.images))
        batches = [synthetic_batch(config, runtime, each) for each in range(first, stop, size)]

        def record_critic(phase: str, start: int = seen) -> None:
            if state.images_seen > start:  # a phase that follows a critic step
                name = f"critic gradients at {state.images_seen} images"
                found[name] = gradients(state.critic)

        def record_generator(logits: dict[str, Tensor]) -> None:
            name = f"generator gradients at {state.images_seen} images"
            found[name] = gradients(state.generator)

        logits = cycle.run(
            batches, is_logged=True, on_phase=record_critic, before_ema=record_generator
        )
        row = metrics_row(state, runtime, config.training.total_images, logits)
        found[f"meters at {state.images_seen} images"] = _as_tensors(row, config)
        if runtime.is_main:  # as for a sample grid, which must not change anything
            _sample(state.generator, config, num_classes)
    for name, tensor in state.audited().items():
        # A network's weights are of one kind, an optimizer's first and second moments of two.
        file, _, key = name.partition(".")
        kind = f"{file} {key.partition('.')[2]}" if file.endswith("_optimizer") else file
        found.setdefault(kind, {})[key] = tensor.detach().clone()
    return found


def _sample(generator: nn.Module, config: Config, num_classes: int) -> None:
    count = up_to_whole_groups(2, generator)
    latents = sample_latents(0, 0, count, config.generator.latent_dim)
    for _ in generate_images(generator, latents, sample_labels(0, count, num_classes)):
        pass


def untried_networks(
    config: Config, num_classes: int, runtime: Runtime
) -> tuple[nn.Module, nn.Module]:
    generator, critic = build_unchecked_networks(config, num_classes)
    return generator.to(runtime.device), critic.to(runtime.device)


def _as_tensors(row: dict[str, Any], config: Config) -> dict[str, Tensor]:
    """The values of a row: of histograms the edges, and in float64 the counts, since rounding does
    not move values between bins there."""
    figures: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, float):
            figures[name] = value
            continue
        figures[f"{name} edges"] = value["edges"]
        if config.training.precision == "float64":
            figures[f"{name} counts"] = value["counts"]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def synthetic_batch(config: Config, runtime: Runtime, position: int) -> Batch:
    """This rank's share of a global batch; each image is a function of its position in the data."""
    positions, slots = batch_positions(
        position, config.training.global_batch_size, LANES, runtime.rank, runtime.world_size
    )
    labels = torch.from_numpy(positions % CLASSES)
    return Batch(
        _synthetic_images(tuple(positions), config.data.sample_shape),
        labels,
        torch.from_numpy(slots),
    )


@lru_cache(maxsize=1000)
def _synthetic_images(positions: tuple[int, ...], shape: tuple[int, int, int]) -> Tensor:
    """Noise around a random brightness per image, so that whole images differ too."""
    channels, height, width = shape
    elements = channels * height * width
    words = random_words(0, "synthetic images", torch.tensor(positions), elements)
    noise, brightness = words & 127, words[:, :1] >> 8 & 127
    images = (noise + brightness).to(torch.uint8)
    return images.view(-1, height, width, channels)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    named = network.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def largest_error(found: Record, expected: Record, floor: float = 0.0) -> tuple[float, str]:
    """(the largest relative error, where it is); infinite if anything is missing or NaN.

    Relative to the largest element of its kind, or to `floor`; for a meter, to itself or 1.
    """
    worst = (0.0, "no difference")
    for kind, tensors in expected.items():
        if found.get(kind, {}).keys() != tensors.keys():
            return math.inf, f"{kind}: other names"
        sizes = {name: tensor.abs().max().item() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            is_meter = kind.startswith("meters")
            size = max(sizes[name], 1.0) if is_meter else max(floor, *sizes.values())
            difference = (found[kind][name].double() - tensor.double()).abs().max().item()
            error = difference / size if size > 0 else difference
            if not math.isfinite(error):
                return math.inf, f"{kind}: {name} is not finite"
            worst = max(worst, (error, f"{kind}: {name}"))
    return worst


def controller_is_idle(config: Config, found: Record) -> bool:
    """Whether the adaptive controller, if there is one, left the probability where it starts, or
    at 0 throughout: then nothing of it was tried."""
    if config.augmentation.adaptive is None:
        return False
    meters = (tensors for kind, tensors in found.items() if kind.startswith("meters"))
    found_values = {tensors["augment/probability"].item() for tensors in meters}
    return found_values <= {0.0} or found_values <= {value_at(config.augmentation.probability, 0)}


def reference_of(combination: Combination, accumulate: int) -> int:
    """The number of micro-batches of the one process that this is compared with."""
    has_batch_norm = VARIANTS[combination.variant].generator.get("norm") == "batch"
    return accumulate if has_batch_norm else 1


def case_name(combination: Combination, accumulate: int, ranks: int, precision: str) -> str:
    return f"{combination.name}/accumulate{accumulate}/ranks{ranks}/{precision}"


def run_rank(folder: Path) -> None:
    """One rank of one world size: all cases. Rank 0 writes rows; a lone one also references."""
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(1)
    runtime = Runtime.start(timeout_seconds=60)
    ranks = runtime.world_size
    references: dict[str, Record] = torch.load(folder / "references.pt") if ranks > 1 else {}
    rows = []
    for names in task["combinations"]:
        combination = Combination(*names)
        for precision in task["precisions"]:
            for accumulate in ACCUMULATE:
                config = config_of(combination, accumulate, precision)
                found = record(config, runtime)
                by = reference_of(combination, accumulate)
                reference = case_name(combination, by, 1, precision)
                if ranks == 1 and accumulate == by:
                    references[reference] = found
                    continue
                error, where = largest_error(found, references[reference])
                if len(set(runtime.all_gather_object(_digest(found)))) > 1:
                    error, where = math.inf, "ranks end with different bits"
                if controller_is_idle(config, found):
                    error, where = math.inf, "the controller of the augmentation does nothing"
                name = case_name(combination, accumulate, ranks, precision)
                rows.append({"name": name, "error": error, "where": where})
    if ranks == 1:
        torch.save(references, folder / "references.pt")
    if runtime.is_main:
        (folder / f"rows{ranks}.json").write_text(json.dumps(rows))
    runtime.close()


def _digest(found: Record) -> str:
    """A hash of all bits: gradients, state and averaged meters."""
    bits = hashlib.sha256()
    for tensors in found.values():
        for tensor in tensors.values():
            bits.update(tensor.contiguous().numpy().tobytes())
    return bits.hexdigest()


def measure(
    matrix: Sequence[Combination],
    precisions: Sequence[str] = tuple(TOLERANCES),
    world_sizes: Sequence[int] = WORLD_SIZES,
    seconds: float = 600,
) -> list[Row]:
    """A row for each combination, number of micro-batches, world size and precision; the worst, in
    units of its tolerance, comes last. Ranks are started once for each world size, 1 first.

    Raises RuntimeError if a rank fails, or takes longer than `seconds`.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = {
            "combinations": [(c.loss, c.penalties, c.variant) for c in matrix],
            "precisions": list(precisions),
        }
        (folder / "task.json").write_text(json.dumps(task))
        for world_size in world_sizes:
            run_ranks("benchmarks.invariance:run_rank", folder, world_size, seconds)
            rows += json.loads((folder / f"rows{world_size}.json").read_text())
    rows.sort(key=lambda row: row["error"] / tolerance_of(row["name"]))
    return [
        Row(
            name=row["name"],
            rival="one process, whole batch",
            ratio=row["error"],
            high=tolerance_of(row["name"]),
            unit="relative error",
            note=row["where"],
        )
        for row in rows
    ]


def tolerance_of(name: str) -> float:
    return TOLERANCES[name.rpartition("/")[2]]


def failures(rows: Sequence[Row]) -> list[Row]:
    """The rows that exceed their tolerance."""
    return [row for row in rows if not row.ratio <= tolerance_of(row.name)]


def main() -> int:
    chosen = arguments(__doc__)
    rows = measure(few_combinations() if chosen.quick else combinations())
    report(rows, chosen.json)
    wrong = failures(rows)
    print(f"\n{len(rows) - len(wrong)} of {len(rows)} rows agree within their tolerance (high)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
