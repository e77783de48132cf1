"""TF32 is off unless the config turns it on, also where torch has it on."""

from collections.abc import Iterator

import pytest
import torch

from ganscale.runtime import Runtime, set_tf32
from tests.helpers.processes import run_python
from tests.helpers.runs import Runs


@pytest.fixture(autouse=True)
def torchs_default() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = True
    yield
    set_tf32(False)


def is_tf32() -> set[bool]:
    """As torch's older and newer interfaces have it, for products and for convolutions."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    found = {products.allow_tf32, convolutions.allow_tf32}
    if hasattr(convolutions, "conv"):
        precisions = products.fp32_precision, convolutions.conv.fp32_precision
        found |= {precision == "tf32" for precision in precisions}
    return found


def test_a_runtime_turns_off_what_torch_has_on() -> None:
    assert is_tf32() == {False, True}
    Runtime.start()
    assert is_tf32() == {False}


def test_a_runtime_turns_on_what_it_is_asked_for() -> None:
    Runtime.start(tf32=True)
    assert is_tf32() == {True}


@pytest.mark.parametrize("setting", [True, False])
def test_a_run_computes_as_its_setting_says(runs: Runs, setting: bool) -> None:
    settings = runs.settings("run", "training.total_images=32", f"training.tf32={setting}")
    program = (
        "import torch; from ganscale.cli.main import main; "
        f"assert main(['train', *{settings}]) == 0; "
        "print('tf32:', torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)"
    )
    assert f"tf32: {setting} {setting}\n" in run_python("-c", program).stdout
