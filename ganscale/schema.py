"""Every setting of a run: its default, its unit and its limits.

The dataclasses are the schema that `ganscale.config` holds files and overrides against. A field
without a default has to be given. Counts of images accept `50k` and `2M` (thousands, millions).
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def number(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field whose value must lie in the stated range."""
    limits = {"at_least": at_least, "above": above, "below": below}
    return field(default=default, metadata={k: v for k, v in limits.items() if v is not None})


def choice(default: Any, *choices: str) -> Any:
    """A field that takes one of a few words."""
    return field(default=default, metadata={"choices": choices})


@dataclass
class RunConfig:
    name: str = MISSING  # the run folder is FOLDER/NAME; the first config file's name by default
    folder: str = "runs"


@dataclass
class DataConfig:
    # a data set: a folder, or the URL of one, with a manifest of WebDataset shards; or the shards
    # themselves (*.tar, with braces or wildcards), which are then streamed in no exact order
    path: str = MISSING
    shards: str = (
        ""  # where the shards lie if not where the manifest says: folder, URL, pipe:COMMAND
    )
    cache: str = "~/.cache/ganscale"  # this machine's copies of remote shards, shared by its ranks
    cache_gib: float = number(100.0, above=0)  # the least recently used copies beyond it go
    retry_seconds: float = number(
        300.0, at_least=0
    )  # a failing disk or network is tried again so long
    resolution: int = number(MISSING, at_least=1)  # pixels; larger images are reduced and cropped
    channels: int = number(3, at_least=1)  # 1 (grey) or 3 (RGB)
    flip: bool = False  # mirror half of the images left to right
    workers: int = number(2, at_least=0)  # decoding threads of a rank, in another process unless 0
    lanes: int = number(64, at_least=1)  # interleaved sequences that make up the data order
    block_samples: int = number(256, at_least=1)  # consecutive samples that are read together
    window_blocks: int = number(8, at_least=1)  # blocks of a lane within which samples are shuffled
    bad_sample_limit: float = number(0.01, at_least=0, below=1)  # share of bad samples to bear
    class_count: int = number(0, at_least=0)  # of streamed shards; a manifest knows its own


@dataclass
class GeneratorConfig:
    target: str = MISSING  # mlp, dcgan, resnet, or package.module:Class
    latent_dim: int = number(128, at_least=1)
    options: dict[str, Any] = field(default_factory=dict)  # the network's own keyword arguments


@dataclass
class CriticConfig:
    target: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossConfig:
    name: str = MISSING
    options: dict[str, float] = field(default_factory=dict)


@dataclass
class PenaltyConfig:
    weight: float = number(MISSING, at_least=0)
    interval: int = number(1, at_least=1)  # critic steps from one to the next, weighted accordingly


@dataclass
class ClipConfig:
    value: float = number(MISSING, above=0)  # weights stay in [-value, value]
    scope: str = choice("weights", "weights", "all")  # weights: tensors of 2 and more dimensions


@dataclass
class ObjectiveConfig:
    loss: LossConfig = field(default_factory=LossConfig)
    penalties: dict[str, PenaltyConfig] = field(default_factory=dict)
    clip: ClipConfig | None = None
    n_critic: int = number(1, at_least=1)  # critic steps to one generator step
    panel: list[str] = field(default_factory=list)  # losses of your own to watch, module:function


@dataclass
class OptimizerConfig:
    name: str = choice("adam", "adam", "rmsprop", "sgd")
    learning_rate: float = number(MISSING, at_least=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # adam
    alpha: float = number(0.99, at_least=0, below=1)  # rmsprop: smoothing of squared gradients
    momentum: float = number(0.0, at_least=0, below=1)  # rmsprop and sgd
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.0, at_least=0)


@dataclass
class OptimizersConfig:
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    generator: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class TrainingConfig:
    total_images: int = number(MISSING, at_least=1)  # real images shown to the critic in all
    global_batch_size: int = number(64, at_least=1)  # images per critic step over all ranks
    accumulate: int = number(1, at_least=1)  # micro-batches per step and rank
    # bfloat16: autocast over float32 weights; float64: slow, to check that runs agree exactly
    precision: str = choice("float32", "float32", "bfloat16", "float64")
    conditional: bool = False  # networks see the class labels of the data
    schedule: str = choice("constant", "constant", "linear", "cosine")  # of both learning rates
    warmup_images: int = number(0, at_least=0)  # the rates rise linearly over these
    gradient_clip: float = number(0.0, at_least=0)  # largest global gradient norm; 0: no limit
    memory_format: str = choice("channels_last", "channels_last", "contiguous")
    # the generator's step judges the very fakes of the critic's last one, as the DCGAN tutorial of
    # PyTorch does: one forward of the generator less a cycle, and another sampling
    reuse_fakes: bool = False
    # autocast: the penalty in the training's precision, too; in bfloat16 its gradient errs by 2 %
    penalty_precision: str = choice("float32", "float32", "autocast")
    # by torch.compile, what is differentiated once: all but penalties. Slower on a CPU
    compile: bool = False
    # bfloat16: half the traffic between ranks, and gradients that depend on the number of ranks
    gradient_compression: str = choice("none", "none", "bfloat16")


@dataclass
class EMAConfig:
    half_life_images: int = number(10_000, at_least=0)  # of the averaged generator; 0: no memory
    ramp_up: float = number(0.05, at_least=0)  # half-life at most this share of the images seen


@dataclass
class LogConfig:
    every_images: int = number(6_400, at_least=1)
    # of one device at the run's precision, for perf/peak_share; 0: as known for some GPUs
    peak_tflops: float = number(0.0, at_least=0)
    wandb: str = choice("auto", "auto", "online", "offline", "disabled")
    project: str = "ganscale"
    alerts: bool = True  # the first NaN, a collapse and the end of the run are told, once each
    # checkpoints that are uploaded when the run is done; best: of `checkpoint.best`
    artifacts: str = choice("none", "none", "last", "best", "both")


@dataclass
class SamplesConfig:
    every_images: int = number(50_000, at_least=1)
    count: int = number(64, at_least=1)
    non_ema: bool = True  # the same latents also through the weights as trained
    interpolations: int = number(
        4, at_least=0
    )  # rows of images from one latent to another; 0: none
    real: bool = True  # a picture of the first real images, too


@dataclass
class CheckpointConfig:
    every_images: int = number(100_000, at_least=1)
    keep_last: int = number(3, at_least=1)
    keep_every_images: int = number(0, at_least=0)  # checkpoints at its multiples stay; 0: none
    best: str = ""  # a logged value whose best checkpoint stays, too (eval/fid, say); "": none
    best_is: str = choice("lowest", "lowest", "highest")
    # where one cannot be written: log an error and train on, or stop once the step is done
    on_failure: str = choice("continue", "continue", "stop")


@dataclass
class AuditConfig:
    every_images: int = number(100_000, at_least=1)  # replicas of all ranks are compared


@dataclass
class ResumeConfig:
    allow: list[str] = field(default_factory=list)  # settings that may differ from the stored run


@dataclass
class RuntimeConfig:
    # without progress on any rank, the run is given up and the rank to blame is named; a process
    # without a sign of life already after a tenth of it, but no sooner than after 30 s
    timeout_seconds: float = number(600.0, above=0)


@dataclass
class ProfileConfig:
    cycles: int = number(0, at_least=0)  # that torch's profiler records, once a run is warm


@dataclass
class Config:
    seed: int = number(0, at_least=0, below=2**64)
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizersConfig = field(default_factory=OptimizersConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    log: LogConfig = field(default_factory=LogConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
