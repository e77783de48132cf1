"""An exported generator is loaded by three lines and makes the same images as its run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ganscale import load_generator
from ganscale.cli.main import main
from ganscale.errors import UserError
from ganscale.evaluation.exported_generator import export_generator
from ganscale.networks.build import build_network
from tests.helpers.processes import run_python
from tests.helpers.runs import Runs

RECIPE = {
    "target": "resnet",
    "options": {"width": 8},
    "latent_dim": 8,
    "sample_shape": (3, 16, 16),
    "num_classes": 3,
}


def exported(folder: Path, **changes: object) -> Path:
    recipe = {**RECIPE, **changes}
    torch.manual_seed(0)
    target, options = recipe["target"], recipe["options"]
    arguments = {name: recipe[name] for name in ("latent_dim", "sample_shape", "num_classes")}
    network = build_network("generator", target, options, **arguments)
    for parameter in network.parameters():  # untrained classes do not differ
        torch.nn.init.normal_(parameter, std=0.3)
    export_generator(folder, network, about={"run": "test"}, **recipe)
    return folder


def as_bytes(images: torch.Tensor) -> np.ndarray:
    """(count, height, width, channels), as pictures store [-1, 1]."""
    scaled = (images.double().numpy() + 1) * 127.5
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    runs = Runs(tmp_path_factory.mktemp("runs"), digits)
    short = ["training.total_images=128", "checkpoint.every_images=64"]
    assert main(["train", *runs.settings("run", *short)]) == 0
    return runs.folder / "run"


_THREE_LINES = """
from ganscale import load_generator
generator = load_generator("out")
images = generator.sample(20, seed=3)
import sys
import numpy as np
np.save("images.npy", images.numpy())
assert images.dtype.is_floating_point and not images.requires_grad
assert not [name for name in sys.modules if name.startswith(("ganscale.training", "wandb"))]
"""


@pytest.mark.parametrize("weights", ["ema", "generator"])
def test_three_lines_make_the_images_of_ganscale_sample_without_a_trainer(
    trained: Path, tmp_path: Path, weights: str
) -> None:
    asked = ["--weights", weights]
    assert main(["checkpoint", "export", str(trained), str(tmp_path / "out"), *asked]) == 0
    png = str(tmp_path / "png")
    sampled = ["--count", "20", "--seed", "3", "--folder", png]
    assert main(["sample", str(trained), *sampled, *asked]) == 0
    run_python("-W", "error", "-c", _THREE_LINES, cwd=tmp_path)
    images = np.load(tmp_path / "images.npy")
    assert images.dtype == np.float32
    pictures = [np.asarray(Image.open(path)) for path in sorted(Path(png).iterdir())]
    assert np.array_equal(as_bytes(torch.from_numpy(images))[..., 0], np.stack(pictures))
    # The weights are those of the newest checkpoint, to the bit.
    saved = load_file(trained / "checkpoints" / "images-000000128" / f"{weights}.safetensors")
    out = load_file(tmp_path / "out" / "generator.safetensors")
    assert saved.keys() == out.keys()
    assert all(torch.equal(saved[name], out[name]) for name in saved)
    about = json.loads((tmp_path / "out" / "generator.json").read_text())["about"]
    assert (about["run"], about["images_seen"], about["weights"]) == ("run", 128, weights)


def test_a_checkpoint_is_chosen_by_name_and_nothing_is_overwritten(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, older = tmp_path / "out", "images-000000064"
    export = ["checkpoint", "export", str(trained)]
    assert main([*export, str(out), "--checkpoint", older]) == 0
    saved = load_file(trained / "checkpoints" / older / "ema.safetensors")
    content = (out / "generator.safetensors").read_bytes()
    weights = load_file(out / "generator.safetensors")
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    capsys.readouterr()
    assert main([*export, str(out)]) == 2
    assert f"{out} already exists" in capsys.readouterr().err
    assert (out / "generator.safetensors").read_bytes() == content
    assert main([*export, str(tmp_path / "x"), "--checkpoint", "images-000000065"]) == 2
    assert "choose from images-000000064, images-000000128" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_images_do_not_depend_on_the_count(tmp_path: Path) -> None:
    generator = load_generator(exported(tmp_path / "out"))
    many = generator.sample(40, seed=7)
    assert many.shape == (40, 3, 16, 16)
    assert many.dtype == torch.float32
    assert float(many.abs().max()) <= 1
    assert torch.equal(generator.sample(3, seed=7), many[:3])
    assert not torch.equal(generator.sample(3, seed=8), many[:3])


def test_classes_come_in_turn_or_as_requested(tmp_path: Path) -> None:
    generator = load_generator(exported(tmp_path / "out"))
    in_turn = generator.sample(6)
    for labels in ([0, 1, 2, 0, 1, 2], torch.arange(6) % 3, torch.arange(6, dtype=torch.int32) % 3):
        assert torch.equal(generator.sample(6, labels=labels), in_turn)
    twos = generator.sample(6, labels=2)
    assert torch.equal(twos[2], in_turn[2])
    assert not torch.equal(twos[0], in_turn[0])
    for labels in (3, -1, [0, 1], torch.zeros(6, 1), torch.zeros(6)):
        with pytest.raises(UserError, match="class"):
            generator.sample(6, labels=labels)
    plain = load_generator(exported(tmp_path / "plain", num_classes=0))
    with pytest.raises(UserError, match="has no classes"):
        plain.sample(2, labels=1)
    with pytest.raises(UserError, match="at least 1, not 0"):
        plain.sample(0)


def test_it_is_a_module_in_evaluation_mode(tmp_path: Path) -> None:
    generator = load_generator(str(exported(tmp_path / "out")))
    assert isinstance(generator, torch.nn.Module)
    assert not any(module.training for module in generator.modules())
    latents, labels = torch.randn(2, 8), torch.tensor([0, 1])
    assert generator(latents, labels).shape == (2, 3, 16, 16)
    assert (generator.latent_dim, generator.num_classes) == (8, 3)
    assert generator.about == {"run": "test"}


def test_importing_ganscale_alone_is_quick() -> None:
    program = (
        "import sys, ganscale; assert 'torch' not in sys.modules; ganscale.__version__; "
        "from ganscale import load_generator; assert 'torch' in sys.modules; "
        "assert not hasattr(ganscale, 'load_generators')"
    )
    run_python("-c", program)


_OWN_NETS = """
from torch import nn

class Generator(nn.Module):
    def __init__(self, latent_dim, sample_shape, hidden=8):
        super().__init__()
        self.shape = sample_shape
        self.layers = nn.Sequential(nn.Linear(latent_dim, hidden), nn.Linear(hidden, 3 * 16 * 16))

    def forward(self, latents):
        return self.layers(latents).tanh().view(-1, *self.shape)

def make(latent_dim, sample_shape):
    raise SystemExit("called")
"""


def test_a_user_defined_network_is_found_by_its_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_of_my_own.py").write_text(_OWN_NETS)
    monkeypatch.chdir(tmp_path)
    own = {"target": "nets_of_my_own:Generator", "options": {"hidden": 5}, "num_classes": 0}
    folder = exported(tmp_path / "out", **own)
    assert load_generator(folder).sample(2).shape == (2, 3, 16, 16)
    monkeypatch.delitem(sys.modules, "nets_of_my_own")
    (tmp_path / "nets_of_my_own.py").unlink()
    with pytest.raises(UserError, match="no module nets_of_my_own"):
        load_generator(folder)


def test_a_network_whose_code_has_changed_is_refused_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "nets_that_change.py"
    source.write_text(_OWN_NETS)
    own = {"target": "nets_that_change:Generator", "options": {"hidden": 5}, "num_classes": 0}
    folder = exported(tmp_path / "out", **own)
    assert "tanh" in _OWN_NETS
    source.write_text(_OWN_NETS.replace("tanh", "sin"))
    monkeypatch.delitem(sys.modules, "nets_that_change")
    with pytest.raises(UserError, match=r"generator nets_that_change:Generator computes something"):
        load_generator(folder)
    load_generator(folder, allow_changed_code=True)


@pytest.mark.parametrize("target", ["os:system", "subprocess:Popen", "nets_with_more:make"])
def test_a_folder_from_elsewhere_can_only_call_what_makes_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "nets_with_more.py").write_text(_OWN_NETS)
    monkeypatch.chdir(tmp_path)
    path = exported(tmp_path / "out") / "generator.json"
    recipe = json.loads(path.read_text())
    recipe |= {"target": target, "options": {"args": ["touch", str(tmp_path / "called")]}}
    path.write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=f"{target} is not a network"):
        load_generator(path.parent)
    assert not (tmp_path / "called").exists()


def test_any_damage_is_reported_in_one_sentence(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    weights, recipe = folder / "generator.safetensors", folder / "generator.json"
    whole = weights.read_bytes()
    for position in (0, 9, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(UserError, match=r"generator\.safetensors is damaged"):
            load_generator(folder)
    weights.write_bytes(whole)
    text = recipe.read_text()
    description = json.loads(text)
    required = set(description) - {"fingerprint"}  # older exports have none
    for wrong in (
        "",
        "[]",
        text[:-20],
        *(json.dumps({k: v for k, v in description.items() if k != name}) for name in required),
        json.dumps({**description, "format": 2}),
        json.dumps({**description, "sample_shape": [3, 16]}),
        json.dumps({**description, "fingerprint": {"dtype": "float64"}}),
        json.dumps({**description, "latent_dim": "8"}),
        json.dumps({**description, "latent_dim": 9}),
        json.dumps({**description, "options": {"widht": 8}}),
    ):
        recipe.write_text(wrong)
        with pytest.raises(UserError, match=r"out|widht"):
            load_generator(folder)
    recipe.write_text(text)
    assert load_generator(folder).sample(1).shape == (1, 3, 16, 16)
    for other in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="does not contain an exported generator"):
            load_generator(other)


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    wrong = build_network(
        "generator", "resnet", {"width": 8}, latent_dim=8, sample_shape=(3, 16, 16), num_classes=0
    )
    with pytest.raises(UserError, match="the weights do not fit resnet"):
        export_generator(tmp_path / "deep" / "out", wrong, about={}, **RECIPE)
    assert list((tmp_path / "deep").iterdir()) == []
