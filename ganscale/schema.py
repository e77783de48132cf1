"""Every setting of a run, with its default, unit, limits and explanation.

`ganscale.config` checks files and overrides against these dataclasses; `ganscale config --explain`
and docs/settings.md print them. A setting without a default is required; the first choice of
`choice` is its default.
"""

from dataclasses import dataclass, field
from typing import Any

from ganscale.schedules import FloatOrSchedule, IntOrSchedule
from ganscale.setting import choice, setting


@dataclass
class RunConfig:
    """Name and folder of the run."""

    name: str = setting("Name of the run; by default the name of the first config file.", "")
    folder: str = setting("Folder of all runs; this one is kept in FOLDER/NAME.", "runs")


@dataclass
class DataConfig:
    """The training images and how they are read."""

    path: str = setting(
        "The folder or URL of a data set with a manifest, or shards (*.tar, with braces or "
        "wildcards) to stream without one, in an order that is not reproducible."
    )
    shards: str = setting(
        "Where the shards are if not where the manifest says: folder, URL or pipe:COMMAND.", ""
    )
    cache: str = setting(
        "Folder for copies of remote shards, shared by all runs of a machine.", "~/.cache/ganscale"
    )
    cache_gib: float = setting(
        "Its size. If full, the least recently used shards are deleted.", 100.0, unit="GiB", above=0
    )
    retry_seconds: float = setting(
        "How long to retry failing I/O, then exit with code 75.", 300.0, unit="seconds", at_least=0
    )
    resolution: int = setting(
        "Width and height; images are cropped to a square and resized.", unit="pixels", at_least=1
    )
    channels: int = setting("Color channels.", 3, choices={1: "gray", 3: "RGB"})
    flip: bool = setting("Mirror half of the images left to right.", False)
    workers: int = setting(
        "Decoding threads per rank, in a separate process. With 0, in the rank.", 2, at_least=0
    )
    lanes: int = setting(
        "Interleaved sequences of the data; ideally a multiple of the rank count.", 64, at_least=1
    )
    block_samples: int = setting("Consecutive samples of a shard read together.", 256, at_least=1)
    window_blocks: int = setting("Blocks of a lane in which samples are shuffled.", 8, at_least=1)
    max_bad_fraction: float = setting(
        "The run stops when a larger share of its samples (of at least 1,000) is bad.",
        0.01,
        at_least=0,
        below=1,
    )
    class_count: int = setting("Number of classes; only needed for streamed shards.", 0, at_least=0)


@dataclass
class GeneratorConfig:
    """The generator network."""

    target: str = setting(
        "Network: mlp, dcgan, resnet, r3gan, stylegan2, or your own as package.module:Class.",
        is_main=True,
    )
    latent_dim: int = setting("Dimensions of a latent vector.", 128, at_least=1)
    options: dict[str, Any] = setting("Keyword arguments of the network, such as width.", dict)


@dataclass
class CriticConfig:
    """The critic network."""

    target: str = setting(
        "Network: mlp, dcgan, resnet, r3gan, stylegan2, or your own as package.module:Class.",
        is_main=True,
    )
    options: dict[str, Any] = setting("Keyword arguments of the network, such as width.", dict)


@dataclass
class LossConfig:
    """The adversarial loss."""

    name: str = setting(
        "Loss: minimax, non_saturating, lsgan, wgan, hinge, relativistic, relativistic_average, or "
        "your own as package.module:function.",
        is_main=True,
    )
    options: dict[str, float] = setting("Arguments of the loss, such as lsgan's labels.", dict)


@dataclass
class PenaltyConfig:
    """A gradient penalty of the critic; NAME is wgan_gp, wgan_lp, wgan_gp_pixel, dragan, r1, r2, or
    your own as package.module:function."""

    weight: FloatOrSchedule = setting(
        "Factor of the penalty in the critic's loss.", at_least=0, is_main=True
    )
    interval: int = setting("Apply it every n critic steps, at n times its weight.", 1, at_least=1)
    patch_score: str = choice(
        "The score of an image of which a patch critic returns a map.",
        sum="the sum of the map, as in published code",
        mean="its mean; the gradient is then smaller by the number of patches",
    )


@dataclass
class GeneratorPenaltyConfig:
    """A penalty of the generator, on how its images follow its styles; NAME is path_length, or your
    own as package.module:function."""

    weight: FloatOrSchedule = setting(
        "Factor of the penalty in the generator's loss; 2 in StyleGAN2.", at_least=0, is_main=True
    )
    interval: int = setting(
        "Apply it every n generator steps, at n times its weight; 4 in StyleGAN2.", 1, at_least=1
    )
    decay: float = setting(
        "Share of a step in the moving average of the lengths.", 0.01, above=0, at_most=1
    )


@dataclass
class ClipConfig:
    """Clipping of the critic's weights after each critic step; off unless `value` is given."""

    value: float = setting("Bound c: weights are clamped to [-c, c].", above=0, is_main=True)
    scope: str = choice(
        "Parameters to clip.",
        weights="those with two or more dimensions, so neither biases nor norm layers",
        all="every parameter",
    )


@dataclass
class ObjectiveConfig:
    """What the two networks minimize."""

    loss: LossConfig = field(default_factory=LossConfig)
    penalties: dict[str, PenaltyConfig] = field(default_factory=dict)
    generator_penalties: dict[str, GeneratorPenaltyConfig] = field(default_factory=dict)
    clip: ClipConfig | None = None
    n_critic: int = setting("Critic steps per generator step.", 1, unit="critic steps", at_least=1)
    panel: list[str] = setting("Your losses to log beside ours, as package.module:function.", list)


@dataclass
class AdaptiveConfig:
    """A controller of `augmentation.probability`: it rises while the critic overfits and falls
    while it does not; off unless `target` is given."""

    target: float = setting(
        "Mean sign of the logits of real images to hold; 0.6 in the paper.",
        above=-1,
        below=1,
        is_main=True,
    )
    every_images: int = setting(
        "Interval between adjustments, taken after a critic step.", 256, unit="images", at_least=1
    )
    full_images: int = setting(
        "Images over which the probability can rise from 0 to 1.",
        500_000,
        unit="images",
        at_least=1,
    )


@dataclass
class AugmentationConfig:
    """Random transformations of real and fake images in front of the critic."""

    pipeline: str = setting(
        "The transformations.",
        "none",
        choices={
            "none": "nothing is applied",
            "ada": "blit, geom, color, filter, noise and cutout, by default the first three "
            "(Karras et al. 2020)",
            "diffaugment": "color, translation and cutout (Zhao et al. 2020)",
        },
        is_main=True,
    )
    strengths: dict[str, float] = setting(
        "Factor of the probability, in [0, 1], of each category or transformation named; all "
        "others are off. With none named, the pipeline's default.",
        dict,
    )
    probability: FloatOrSchedule = setting(
        "Probability of each transformation at strength 1; with `adaptive`, at the start.",
        0.0,
        at_least=0,
        at_most=1,
    )
    adaptive: AdaptiveConfig | None = None


@dataclass
class OptimizerConfig:
    """Algorithm and hyperparameters."""

    name: str = setting("Algorithm.", "adam", choices=("adam", "rmsprop", "sgd"))
    learning_rate: FloatOrSchedule = setting("Learning rate.", at_least=0)
    betas: list[FloatOrSchedule] = setting(
        "Decay rates of Adam's moments, in [0, 1).", lambda: [0.9, 0.999]
    )
    alpha: float = setting("Smoothing of RMSprop's squared gradients.", 0.99, at_least=0, below=1)
    momentum: float = setting("Momentum of RMSprop and SGD.", 0.0, at_least=0, below=1)
    eps: float = setting("Small number added to Adam's and RMSprop's denominator.", 1e-8, above=0)
    weight_decay: float = setting("Factor of the L2 penalty on the weights.", 0.0, at_least=0)


@dataclass
class OptimizersConfig:
    """The optimizers of the two networks."""

    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    generator: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class TrainingConfig:
    """Length, batches, numerical precision and speed."""

    total_images: int = setting(
        "Real images shown to the critic in the whole run.", unit="images", at_least=1
    )
    global_batch_size: int = setting("Images per critic step over all ranks.", 64, at_least=1)
    accumulate: int = setting(
        "Micro-batches into which a rank splits its share, to save memory.", 1, at_least=1
    )
    precision: str = choice(
        "Floating-point precision of the networks.",
        float32="full precision",
        bfloat16="autocast over float32 weights",
        float64="slow; to check that two runs agree",
    )
    tf32: bool = setting(
        "Let NVIDIA GPUs round the factors of float32 products and convolutions to 10 bits of "
        "fraction (TF32). This is faster, but another precision, for penalties too.",
        False,
    )
    conditional: bool = setting("Pass class labels to both networks.", False)
    gradient_clip: float = setting(
        "Clip the norm of each network's gradient to this; 0: off.", 0.0, at_least=0
    )
    memory_format: str = setting(
        "Layout of images and weights.", "channels_last", choices=("channels_last", "contiguous")
    )
    reuse_fakes: bool = setting(
        "Train the generator on the fakes of the cycle's last critic step, as PyTorch's DCGAN "
        "tutorial does. This saves a forward of the generator per cycle but samples differently.",
        False,
    )
    generator_real: str = choice(
        "Real images of the generator's step, for a loss that compares its fakes with them.",
        critic="those of the cycle's last critic step",
        fresh="a batch of its own, the next of the data order, as in R3GAN's code",
    )
    penalty_precision: str = choice(
        "Precision of gradient penalties.",
        float32="full precision",
        autocast="that of training.precision; in bfloat16 the gradient errs by about 2 %",
    )
    compile: bool = setting("Use torch.compile, except for penalties; slower on a CPU.", False)
    cuda_graphs: str = choice(
        "Replay steps as CUDA graphs, which start with one launch each. Not yet tried on a GPU.",
        false="never",
        auto="on one GPU, without training.compile, and with plain numbers for betas",
        true="the same, or an error",
    )
    gradient_compression: str = choice(
        "Format in which ranks exchange gradients.",
        none="as computed",
        bfloat16="half the traffic; the last digits then depend on the number of ranks",
    )


@dataclass
class EMAConfig:
    """The exponential moving average of the generator's weights."""

    half_life_images: IntOrSchedule = setting(
        "Half-life of past weights; with 0, nothing is averaged.", 10_000, unit="images", at_least=0
    )
    ramp_up: float = setting("Largest half-life, as a share of the images seen.", 0.05, at_least=0)


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
        "Use so many images of it, chosen at random; 0: all.", 0, unit="images", at_least=0
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
        "Also keep checkpoints at multiples of this; 0: off.", 0, unit="images", at_least=0
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


@dataclass
class AuditConfig:
    """Audits compare weights and optimizer states over all ranks, also before checkpoints."""

    every_images: int = setting("Interval between comparisons.", 100_000, unit="images", at_least=1)


@dataclass
class ResumeConfig:
    """Continuing a stored run."""

    allow: list[str] = setting("Changed settings to accept although they change the curve.", list)


@dataclass
class RuntimeConfig:
    """Supervision of the ranks. The run also ends when a rank gives no sign of life for a tenth of
    `timeout_seconds` (but at least 30 s)."""

    timeout_seconds: float = setting(
        "The run ends when no rank makes progress for this long.", 600.0, unit="seconds", above=0
    )
    join_timeout_seconds: float = setting(
        "At the start, each rank waits this long for all others.", 120.0, unit="seconds", above=0
    )
    health_check_seconds: float = setting(
        "Before training, every device must compute, and the ranks add up a tensor, within this "
        "long; 0: no check.",
        60.0,
        unit="seconds",
        at_least=0,
    )


@dataclass
class ProfileConfig:
    """Profiling of some cycles with PyTorch's profiler."""

    cycles: int = setting("Cycles to profile once the run is warm; 0: off.", 0, at_least=0)


@dataclass
class Config:
    seed: int = setting(
        "Seed of initial weights, data order and all other randomness.", 0, at_least=0, below=2**64
    )
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizersConfig = field(default_factory=OptimizersConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    log: LogConfig = field(default_factory=LogConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
