"""`training.compile`: the same training, for whoever has a compiler."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.ranks import run_ranks
from tests.helpers.processes import run_python
from tests.training.compiled_process import after_a_cycle

SEVERAL_NETWORKS = """
import torch
from ganscale.training.fast_forward import fast_forward

torch._dynamo.config.recompile_limit = 2
for width in range(1, 5):
    run = fast_forward(torch.nn.Linear(width, 1), compiles=True)
    for batch in (2, 3):
        run(torch.ones(batch, width), None)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_two_compiled_ranks_end_with_the_weights_of_one_as_it_is(tmp_path: Path) -> None:
    run_ranks("tests.training.compiled_process:run_rank", tmp_path, 2, seconds=600)
    expected = after_a_cycle()
    for rank in range(2):
        found = torch.load(tmp_path / f"weights{rank}.pt")
        for name, value in expected.items():
            assert (found[name] - value).abs().max().item() < 1e-11, name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_network_does_not_use_up_the_compiled_forms_of_another() -> None:
    """Each of four has the two that the limit allows; beyond it, torch would not compile."""
    assert run_python("-c", SEVERAL_NETWORKS).stdout == "8\n"


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "no-compiler-here"}
    said = run_python("-m", "tests.training.compiled_process", env=env).stdout
    assert said.startswith("`training.compile`: a network cannot be compiled: ")
    assert said.count("\n") == 1
