import sys

import pytest
import torch
from torch import nn

from ganscale.config import resolve
from ganscale.errors import UserError
from ganscale.networks.build import build_network, parameter_count
from ganscale.networks.resnet import ResNetCritic
from ganscale.plan.meta_device import META, meta_device
from ganscale.plan.networks import planned_networks
from ganscale.random import drawing
from ganscale.ready import ready_configs

OWN_NETWORKS = """
import functools
from torch import nn

class Minimal(nn.Module):
    def __init__(self, hidden=3):
        super().__init__()
        self.layer = nn.Linear(hidden, 1)

class Curious(nn.Module):
    def __init__(self, num_classes, *, depth, **rest):
        super().__init__()
        self.seen = {"num_classes": num_classes, "depth": depth, **rest}

class Strict(nn.Module):
    def __init__(self, sample_shape, hidden):
        super().__init__()
        self.layer = nn.Linear(hidden + 1, sample_shape[0])

def not_a_module() -> nn.Module:
    return 3

def undeclared():
    raise AssertionError("called")

def declared(width=1) -> nn.Linear:
    return nn.Linear(width, 1)

@functools.wraps(declared)
def wrapped(*args, **kwargs):
    return declared(*args, **kwargs)

constant = 7
"""

STRINGS = """
from __future__ import annotations
from torch import nn

def declared() -> nn.Linear:
    return nn.Linear(1, 1)

def unknown() -> missing.Linear:
    raise AssertionError("called")
"""


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    """own_networks.py in the current folder, which is not on sys.path, as under a launcher."""
    (tmp_path / "own_networks.py").write_text(OWN_NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    yield tmp_path
    for name in ("own_networks", "broken_networks", "needy_networks", "own_strings"):
        sys.modules.pop(name, None)


def critic(target, **options):
    return build_network("critic", target, options, sample_shape=(3, 32, 32), num_classes=10)


def generator(target, **options):
    return build_network(
        "generator", target, options, latent_dim=8, sample_shape=(3, 32, 32), num_classes=10
    )


def test_a_name_builds_our_network_for_the_runs_shapes_and_classes():
    built = critic("resnet", width=4)
    assert isinstance(built, ResNetCritic)
    assert built.embedding is not None
    assert built.embedding.num_embeddings == 10
    assert generator("resnet", width=4).is_conditional


@pytest.mark.parametrize("name", [name for name in ready_configs() if "/" not in name])
def test_the_networks_of_every_ready_config_fit_its_images(name):
    config = resolve([name]).config
    classes = 10 if config.training.conditional else 0
    with meta_device(1), torch.device(META):
        made, critic = planned_networks(config, classes)
        labels = torch.zeros(4, dtype=torch.int64) if classes else None
        with drawing(0, ("images",), torch.arange(4)):
            images = made(torch.empty(4, config.generator.latent_dim), labels)
        assert images.shape == (4, *config.data.sample_shape)
        assert critic(images, labels).shape == (4,)


def test_a_users_network_gets_only_the_arguments_that_it_accepts(own_networks):
    assert parameter_count(critic("own_networks:Minimal", hidden=5)) == 5 + 1
    seen = generator("own_networks:Curious", depth=2, colour="red").seen
    assert seen == {
        "num_classes": 10,
        "depth": 2,
        "colour": "red",
        "latent_dim": 8,
        "sample_shape": (3, 32, 32),
    }


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        ("resnt", {}, "unknown network 'resnt' .did you mean 'resnet'.*package.module:Name"),
        ("own_networks.Minimal", {}, "unknown network .*your own as package.module:Name"),
        ("missing_networks:Critic", {}, "no module missing_networks in the current folder"),
        ("own_networks:Minimall", {}, "own_networks has no Minimall .did you mean 'Minimal'"),
        ("own_networks:constant", {}, "own_networks:constant is not a network"),
        ("own_networks:undeclared", {}, "is not a network: it must be a subclass of Module, or a"),
        ("own_networks:not_a_module", {}, "is a int, not a torch.nn.Module"),
        ("own_networks:Minimal", {"hiden": 1}, "no option 'hiden' .did you mean 'hidden'"),
        ("own_networks:Strict", {}, "cannot be built: TypeError: .*hidden"),
        ("own_networks:Strict", {"hidden": "4"}, "cannot be built: TypeError: "),
        ("resnet", {"spectral": True}, "no option 'spectral' .did you mean 'spectral_norm'"),
        ("resnet", {"num_classes": 3}, "num_classes of critic resnet follows from the run"),
        ("resnet", {"width": 0}, "width of resnet must be a whole number above 0, not 0"),
    ],
)
def test_a_mistake_gets_one_sentence_with_the_nearest_name(own_networks, target, options, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        critic(target, **options)
    assert "\n" not in str(caught.value)


def test_a_function_that_is_annotated_to_return_a_network_makes_one(own_networks):
    (own_networks / "own_strings.py").write_text(STRINGS)
    for target in ("own_networks:declared", "own_networks:wrapped", "own_strings:declared"):
        assert isinstance(critic(target), nn.Linear)
    with pytest.raises(UserError, match="own_strings:unknown is not a network"):
        critic("own_strings:unknown")


@pytest.mark.parametrize(
    "target", ["os:system", "subprocess:Popen", "builtins:exec", "shutil:rmtree", "torch:load"]
)
def test_what_does_not_make_networks_is_never_called(own_networks, target):
    for build in (critic, generator):
        with pytest.raises(UserError, match=f"{target} is not a network"):
            build(target, command="touch called", args="touch called", path=str(own_networks))
    assert own_networks.exists()
    assert not (own_networks / "called").exists()


def test_a_users_module_that_fails_on_import_is_named_with_reason_and_line(own_networks):
    (own_networks / "broken_networks.py").write_text("import torch\nwidth = 1 / 0\n")
    with pytest.raises(UserError, match=r"ZeroDivisionError.*broken_networks.py:2"):
        critic("broken_networks:Critic")
    (own_networks / "needy_networks.py").write_text("import package_that_is_not_there\n")
    with pytest.raises(UserError, match="needs package_that_is_not_there, which is not installed"):
        critic("needy_networks:Critic")


def test_parameter_count_leaves_out_frozen_parameters_and_counts_shared_ones_once():
    shared = nn.Linear(3, 4)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert parameter_count(nn.Sequential(shared, shared, frozen)) == 3 * 4 + 4
