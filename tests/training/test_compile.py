"""`training.compile`: the same training, for whoever has a compiler."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.ranks import run_ranks
from tests.helpers.processes import run_python
from tests.training.compiled_process import after_a_cycle


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_two_compiled_ranks_end_with_the_weights_of_one_as_it_is(tmp_path: Path) -> None:
    run_ranks("tests.training.compiled_process:run_rank", tmp_path, 2, seconds=600)
    expected = after_a_cycle()
    for rank in range(2):
        found = torch.load(tmp_path / f"weights{rank}.pt")
        for name, value in expected.items():
            assert (found[name] - value).abs().max().item() < 1e-11, name


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "no-compiler-here"}
    said = run_python("-m", "tests.training.compiled_process", env=env).stdout
    assert said.startswith("`training.compile`: a network cannot be compiled: ")
    assert said.count("\n") == 1
