"""What a run shows and keeps."""

from dataclasses import dataclass
from typing import Any

from ganscale.setting import choice, setting


@dataclass
class LogConfig:
    """Metrics and Weights & Biases."""

    every_images: int = setting("Interval between metric rows.", 6_400, unit="images", at_least=1)
    peak_tflops: float = setting(
        "Peak speed of one device at the run's precision, for perf/peak_share. With 0, it is "
        "looked up for well-known GPUs.",
        0.0,
        unit="TFLOP/s",
        at_least=0,
    )
    wandb: str = choice(
        "Mode of Weights & Biases.",
        auto="WANDB_MODE if set; otherwise online with an API key, offline without",
        online="upload while training; needs an API key",
        offline="keep files to upload later",
        disabled="do not use it",
    )
    project: str = setting(
        "Project on Weights & Biases; by default WANDB_PROJECT, that of `wandb init`, or ganscale.",
        "",
    )
    entity: str = setting("User or team there; by default WANDB_ENTITY or the account's own.", "")
    group: str = setting("Group of runs there; by default WANDB_RUN_GROUP.", "")
    job_type: str = setting("Kind of run within its group; by default WANDB_JOB_TYPE.", "")
    tags: list[str] = setting("Tags there; by default WANDB_TAGS.", list)
    notes: str = setting("A description of the run there; by default WANDB_NOTES.", "")
    alerts: bool = setting(
        "Send an alert at the first NaN or infinity, at a collapse and at the end of the run.", True
    )
    artifacts: str = choice(
        "Checkpoints to upload to Weights & Biases when the run is done.",
        none="nothing",
        last="the newest",
        best="the best by checkpoint.best",
        both="the newest and the best",
    )


@dataclass
class SamplesConfig:
    """Sample grids."""

    every_images: int = setting("Interval between sample grids.", 50_000, unit="images", at_least=1)
    count: int = setting("Images in a sample grid.", 64, unit="images", at_least=1)
    non_ema: bool = setting("Also draw the same latents with the non-EMA weights.", True)
    interpolations: int = setting("Rows that interpolate two latents. With 0, none.", 4, at_least=0)
    real: bool = setting("Also draw a grid of real images, once.", True)


@dataclass
class EvaluationConfig:
    """Figures of sample quality, such as FID, of the EMA generator."""

    every_images: int = setting("Interval between evaluations; 0: none.", 0, at_least=0)
    samples: int = setting("Generated images to judge.", 50_000, unit="images", at_least=2)
    metrics: list[str] = setting(
        "Figures: fd (with Inception, FID), fd64, kid, kid_subsets, precision, recall, density, "
        "coverage, is, modes, class_kl.",
        lambda: ["fd", "fd64"],
    )
    network: str = setting(
        "Feature network: efficientnet_lite0, inception, dinov2, or your own as "
        "package.module:Class.",
        "efficientnet_lite0",
    )
    options: dict[str, Any] = setting("Keyword arguments of the network, such as path.", dict)
    reference: str = setting(
        "What samples are compared with: a data set with a manifest, or a file of mu and sigma "
        "(.npz); by default the run's own data.",
        "",
    )
    reference_images: int = setting(
        "Images of the reference to use, chosen at random; 0: all.", 0, unit="images", at_least=0
    )
    batch_size: int = setting(
        "Images per forward of the generator and the network, on every number of ranks.",
        64,
        unit="images",
        at_least=1,
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_images: int = setting("Interval between checkpoints.", 100_000, unit="images", at_least=1)
    keep_last: int = setting("Newest checkpoints to keep.", 3, unit="checkpoints", at_least=1)
    keep_every_images: int = setting(
        "Also keep the first checkpoint at or after each multiple of this; 0: off.",
        0,
        unit="images",
        at_least=0,
    )
    best: str = setting(
        "Also keep the checkpoint with the best value of this metric, such as eval/fid.", ""
    )
    best_is: str = setting("Which value of it is best.", "lowest", choices=("lowest", "highest"))
    on_failure: str = setting(
        "What to do when a checkpoint cannot be written.",
        "continue",
        choices={"continue": "log an error and train on", "stop": "stop after the current cycle"},
    )
