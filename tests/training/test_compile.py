"""`training.compile`: the same training, for whoever has a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def said(cache: Path, **environment: str) -> str:
    """What tests/training/compiled_process.py prints."""
    return subprocess.run(
        [sys.executable, "-m", "tests.training.compiled_process"],
        cwd=REPOSITORY,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    ).stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_cycle_ends_with_the_same_weights(tmp_path: Path) -> None:
    assert float(said(tmp_path)) < 1e-11


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    sentence = said(tmp_path, CXX="no-compiler-here")
    assert sentence.startswith("`training.compile`: a network cannot be compiled: ")
    assert sentence.count("\n") == 1
