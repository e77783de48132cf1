"""Generators that give their styles: what path length and truncation need of them.

Such a generator has two methods, of which its forward is made:

    styles(latents, labels=None) -> (batch, layers, dim)
    synthesis(styles) -> images

In StyleGAN's papers, `styles` is the mapping network f: Z -> W with a copy of w for each layer, and
`synthesis` is the network g.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ganscale.errors import GanscaleError, UserCodeError, UserError
from ganscale.importing import describe
from ganscale.networks.batch_groups import batch_group_size
from ganscale.networks.normalization import BATCH_NORMS
from ganscale.runtime import is_of_machine


def check_has_styles(generator: nn.Module, what: str) -> None:
    """Raises UserError if the generator does not give its styles, which `what` needs."""
    for name in ("styles", "synthesis"):
        if not callable(getattr(generator, name, None)):
            raise UserError(
                f"{what} needs a generator that gives its styles: {type(generator).__name__} has "
                f"no method `{name}` (see docs/objectives.md, Penalties of the generator)"
            )


def check_has_own_gradients(generator: nn.Module, what: str) -> None:
    """Raises UserError for batch norms and groups, through which `what` would differentiate other
    images."""
    if (size := batch_group_size(generator)) > 1:
        raise UserError(
            f"{what} needs the derivative of each image by its own styles, but the generator looks "
            f"at groups of {size} images (its `batch_group_size`)"
        )
    for name, module in generator.named_modules():
        if isinstance(module, BATCH_NORMS):
            raise UserError(
                f"{what} needs the derivative of each image by its own styles, but the generator's "
                f"layer `{name}` is a batch norm, which ties the images of a batch together: use "
                "another norm, or none"
            )


def run_styles(
    generator: nn.Module, latents: Float[Tensor, "batch latent"], labels: Tensor | None = None
) -> Float[Tensor, "batch layers dim"]:
    """Raises UserCodeError for whatever the network raises, and UserError for another shape."""
    inputs = (latents,) if labels is None else (latents, labels)
    styles = _run(generator, "styles", *inputs)
    is_tensor = isinstance(styles, Tensor)
    if not is_tensor or styles.ndim != 3 or len(styles) != len(latents):
        shown = tuple(styles.shape) if is_tensor else type(styles).__name__
        raise UserError(
            f"{type(generator).__name__}.styles returns {shown} for a batch of {len(latents)}: it "
            "must be a tensor of (batch, layers, dimensions)"
        )
    return styles


def run_synthesis(
    generator: nn.Module, styles: Float[Tensor, "batch layers dim"]
) -> Float[Tensor, "batch *sample"]:
    """Raises UserCodeError for whatever the network raises."""
    return _run(generator, "synthesis", styles)


def _run(generator: nn.Module, name: str, *inputs: Tensor) -> Any:
    method: Callable[..., Any] = getattr(generator, name)
    try:
        return method(*inputs)
    except GanscaleError:
        raise
    except Exception as error:
        if is_of_machine(error):
            raise
        message = f"{type(generator).__name__} fails in its {name}: {describe(error)}"
        raise UserCodeError(message) from error
