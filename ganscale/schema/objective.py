"""What the networks minimize, and what is done to images in front of the critic."""

from dataclasses import dataclass, field

from ganscale.schedules import FloatOrSchedule
from ganscale.setting import choice, setting


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
    """A penalty of the generator on how its images change with its styles; NAME is path_length
    (path length regularization) or your own as package.module:function."""

    weight: FloatOrSchedule = setting(
        "Factor of the penalty in the generator's loss; 2 in StyleGAN2.", at_least=0, is_main=True
    )
    interval: int = setting(
        "Apply it every n generator steps, at n times its weight; 4 in StyleGAN2.", 1, at_least=1
    )
    decay: float = setting(
        "Weight of a new mean in the moving average of the lengths.", 0.01, above=0, at_most=1
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
