"""Whole cycles on the device, alone and with two ranks, against one process on the CPU."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.invariance import Record, largest_error
from tests.cuda.cases import PENALTY_PRECISIONS, Records
from tests.cuda.conftest import records_of

# TF32 would err by 5e-4.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4}


def assert_close(found: Records, expected: Records) -> None:
    errors = {
        name: largest_error(found[name], expected[name])
        for name in expected
        if name not in PENALTY_PRECISIONS
    }
    assert errors
    wrong = {
        name: error for name, error in errors.items() if error[0] > TOLERANCES[name.split("/")[-1]]
    }
    assert not wrong


def test_cycles_are_those_of_the_cpu(of_device: Records, of_cpu: Records) -> None:
    assert_close(of_device, of_cpu)


def test_two_ranks_on_one_device_train_as_one_on_the_cpu(
    environment: Mapping[str, str], of_cpu: Records, tmp_path: Path
) -> None:
    # NCCL refuses two ranks on a GPU; LOCAL_RANK is its number.
    on_one = {**environment, "BACKEND": "gloo", "LOCAL_RANK": "0"}
    assert_close(records_of(tmp_path, 2, on_one), of_cpu)


def test_two_ranks_on_two_gpus_train_as_one_on_the_cpu(
    gpu: torch.device, environment: Mapping[str, str], of_cpu: Records, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for each rank, and there is one")
    assert_close(records_of(tmp_path, 2, {**environment, "BACKEND": "nccl"}), of_cpu)


def first_gradients(record: Record) -> Record:
    """The critic's, at the weights that all precisions start with."""
    kind = next(kind for kind in record if kind.startswith("critic gradients"))
    return {kind: record[kind]}


def test_a_penalty_in_float32_is_exact_while_the_rest_is_in_bfloat16(of_device: Records) -> None:
    exact, mixed, rounded = (first_gradients(of_device[name]) for name in PENALTY_PRECISIONS)
    assert largest_error(mixed, exact)[0] < 1e-5
    assert largest_error(rounded, exact)[0] > 1e-3
