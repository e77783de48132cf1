"""How the networks are trained."""

from dataclasses import dataclass, field

from ganscale.schedules import FloatOrSchedule, IntOrSchedule
from ganscale.setting import choice, setting


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
    ramp_up: float = setting(
        "Largest half-life, as a share of the images seen; with 0, nothing is averaged.",
        0.05,
        at_least=0,
    )
