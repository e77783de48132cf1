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


DRAWS = """
import torch
from benchmarks.tiny_networks import TinyCritic, TinyGenerator
from ganscale.networks.random_layers import name_random_layers
from ganscale.random import drawing
from ganscale.training.fast_forward import fast_forward

shape, slots = (2, 8, 8), torch.tensor([3, 1, 7, 4])
generator = TinyGenerator(6, shape, draws=True), torch.randn(4, 6)
critic = TinyCritic(shape, draws=True, checkpoints=True), torch.rand(4, *shape)
for network, inputs in (generator, critic):
    name_random_layers(network.double())
    gradients = []
    for compiles in (False, True):
        run = fast_forward(network, compiles)
        for _ in range(3):  # what the first draws one by one, later ones draw at once
            with drawing(1, ("fakes",), slots):
                outputs = run(inputs.double(), None)
            loss = outputs.square().sum()
            gradients.append(torch.autograd.grad(loss, [*network.parameters()]))
    for found in gradients[1:]:
        for pair in zip(found, gradients[0]):
            torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)
print("the same")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_draws_the_same_numbers() -> None:
    """Also in the recomputation of a checkpointed forward."""
    assert run_python("-c", DRAWS).stdout == "the same\n"


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
