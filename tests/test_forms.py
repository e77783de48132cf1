"""`benchmarks.forms` switches what it names, and a switched form computes the same."""

import pytest
import torch

from benchmarks.forms import FORMS, Switched
from benchmarks.invariance import largest_error
from benchmarks.ours import Ours, config_of, random_images
from ganscale.runtime import Runtime
from ganscale.schema import Config

SMALL = (
    "generator.options.width=4",
    "critic.options.width=4",
    "training.precision=float64",
    # With the usual one, gradients that are nothing but rounding would become whole steps.
    "optimizer.critic.eps=1e-2",
    "optimizer.generator.eps=1e-2",
)


def ours(config: Config, runtime: Runtime) -> Ours:
    torch.manual_seed(0)
    return Ours(config, runtime, random_images(config, runtime.device))


@pytest.mark.parametrize(
    ("objective", "form"),
    [
        *(("wgan_gp", form) for form in ("first_derivatives", "subpixel", "unpool")),
        *(("wgan_gp", form) for form in ("fakes_together", "subpixel+first_derivatives", "all")),
        ("r1", "shared_forward"),
    ],
)
def test_a_cycle_with_a_switched_form_computes_the_same(
    runtime: Runtime, objective: str, form: str
) -> None:
    config = config_of(objective, "resnet32", 4, *SMALL)
    plain, other = ours(config, runtime), ours(config, runtime)
    switched = Switched(other, FORMS[form])
    plain()
    switched()
    assert switched.effects <= {*FORMS[form]}
    assert form == "all" or switched.effects == {*FORMS[form]}
    found, expected = ({"": each.state.audited()} for each in (switched, plain))
    error, where = largest_error(found, expected)
    assert error < 1e-9, where


def test_im2col_is_asked_for_in_bfloat16_with_many_channels(runtime: Runtime) -> None:
    widths = ("generator.options.width=64", "critic.options.width=64")
    half = ("training.precision=bfloat16", "training.penalty_precision=autocast")
    config = config_of("wgan_gp", "dcgan32", 2, *widths, *half)
    switched = Switched(ours(config, runtime), FORMS["im2col"])
    switched()
    assert switched.effects == {"im2col"}


def test_functions_are_those_of_the_device_again_after_an_error(runtime: Runtime) -> None:
    config = config_of("wgan_gp", "dcgan32", 2, *SMALL)
    plain = ours(config, runtime)
    switched = Switched(plain, FORMS["all"])
    with pytest.raises(AssertionError):
        switched.run([])
    switched.effects.clear()
    plain()
    assert not switched.effects
