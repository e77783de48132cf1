"""DINOv2 through transformers, with a small network of random weights in a folder."""

import hashlib
import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ganscale.errors import UserError
from ganscale.evaluation.feature_networks.build import build_feature_network, check_feature_network
from ganscale.evaluation.feature_networks.feature_network import FeatureNetwork
from ganscale.files import sha256
from tests.helpers.processes import run_python

SHAPE = (3, 32, 32)
HEADS, LAYERS, PATCH = 2, 2, 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=224,
        patch_size=PATCH,
        hidden_dropout_prob=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(config)
        for parameter in model.parameters():  # their layer scales and biases say nothing
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def build(path: Path | str, shape: tuple[int, int, int] = SHAPE) -> FeatureNetwork:
    place: dict[str, Any] = {"sample_shape": shape, "cache": Path("unused"), "retry_seconds": 0.0}
    check_feature_network("dinov2", {"path": str(path)}, **place)
    device = torch.device("cpu")
    return build_feature_network("dinov2", {"path": str(path)}, device=device, **place)


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def class_tokens(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """A pre-norm vision transformer with layer scales, from the paper (Dosovitskiy et al.,
    arXiv:2010.11929; Touvron et al., arXiv:2103.17239), in float64."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6
        )

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    patches = "embeddings.patch_embeddings.projection"
    x = F.conv2d(x, weights[f"{patches}.weight"], weights[f"{patches}.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + weights["embeddings.position_embeddings"]
    for layer in range(LAYERS):
        block = f"encoder.layer.{layer}"
        y = norm(x, f"{block}.norm1")
        attention = f"{block}.attention.attention"
        q, k, v = (heads(linear(y, f"{attention}.{name}")) for name in ("query", "key", "value"))
        y = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        y = linear(y.transpose(1, 2).flatten(2), f"{block}.attention.output.dense")
        x = x + y * weights[f"{block}.layer_scale1.lambda1"]
        y = linear(
            F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2"
        )
        x = x + y * weights[f"{block}.layer_scale2.lambda1"]
    return norm(x, "layernorm")[:, 0]


@pytest.mark.parametrize("shape", [SHAPE, (1, 28, 28), (3, 300, 260)])
def test_features_are_the_class_token_of_the_paper_in_float64(
    shape: tuple[int, int, int], folder: Path
) -> None:
    from safetensors.torch import load_file

    network, batch = build(folder, shape), images(3, *shape)
    weights = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    x = batch.double().expand(-1, 3, -1, -1) / 255
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    expected = class_tokens(weights, (x - mean) / deviation)
    found = network(batch)
    assert (network.dim, network.num_classes, found.probabilities) == (32, 0, None)
    assert torch.linalg.norm(found.features - expected) < 1e-4 * torch.linalg.norm(expected)
    assert network.checksum == sha256(folder / "model.safetensors")
    assert torch.equal(found.features, build(folder, shape)(batch).features)


def test_the_librarys_settings_stay_as_they_were(folder: Path) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    for switch in (logging.enable_progress_bar, logging.disable_progress_bar):
        switch()
        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        has_no_bars = are_progress_bars_disabled()
        build(folder)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
        assert are_progress_bars_disabled() == has_no_bars
    logging.enable_progress_bar()


def test_weights_in_several_files_are_read(folder: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    Dinov2Model.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    network, batch = build(tmp_path), images(2, *SHAPE)
    assert torch.equal(network(batch).features, build(folder)(batch).features)
    assert network.checksum != build(folder).checksum


def changed_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def without_last_layer(folder: Path) -> None:
    changed_config(folder, num_hidden_layers=LAYERS + 1)


FOLDERS = {
    "no config": (remove("config.json"), "has no config.json that can be read"),
    "no weights": (remove("model.safetensors"), r"has no model\*.safetensors"),
    "another model": (
        lambda folder: changed_config(folder, model_type="bert"),
        "holds a model of type bert, not dinov2",
    ),
    "cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
        "dinov2 cannot be read from",
    ),
    "other sizes": (lambda folder: changed_config(folder, hidden_size=64), "cannot be read from"),
    "a layer less": (without_last_layer, "the weights in .* lack .* and .* more"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_holds_something_else_is_one_sentence(
    case: str, folder: Path, tmp_path: Path
) -> None:
    damage, problem = FOLDERS[case]
    copy = tmp_path / "dinov2"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(UserError, match=problem) as failure:
        build(copy)
    assert "\n" not in str(failure.value)


def test_a_missing_package_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'ganscale\[dinov2\]'"):
        build(folder)


RUN = """
import sys, warnings
warnings.simplefilter("error")
from pathlib import Path
import torch
from ganscale.errors import GanscaleError
from ganscale.evaluation.feature_networks.build import build_feature_network, check_feature_network
place = dict(sample_shape=(3, 32, 32), cache=Path("unused"), retry_seconds=0.0)
command, path = sys.argv[1:]
try:
    check_feature_network("dinov2", {"path": path}, **place)
    if command == "build":
        build_feature_network("dinov2", {"path": path}, device=torch.device("cpu"), **place)
    print("fine")
except GanscaleError as error:
    print(type(error).__name__, error)
"""


def test_a_folder_is_read_without_a_network_and_without_a_word(folder: Path) -> None:
    done = run_python("-c", RUN, "build", str(folder))
    assert (done.stdout, done.stderr) == ("fine\n", "")


def in_hub_cache(folder: Path, home: Path) -> None:
    """Puts the folder where huggingface_hub keeps what it has fetched."""
    cached = home / "hub" / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_name_on_the_hub_is_found_in_the_hubs_cache_without_a_network(
    offline: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    missing = run_python("-c", RUN, "check", "someone/small").stdout
    problem = "someone/small is neither a folder nor can it be fetched from the hub"
    assert missing.count("\n") == 1
    assert f"feature network dinov2: {problem}" in missing
    assert missing.startswith("UserError" if offline == "1" else "UnavailableError")
    in_hub_cache(folder, tmp_path)
    assert run_python("-c", RUN, "check", "someone/small").stdout == "fine\n"


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does for the model someone/small."""

    protocol_version = "HTTP/1.1"
    folder: Path
    served: Counter[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, commit = self.path.partition("?")[0], "1" * 40
        model, _, name = path.partition(f"/resolve/{commit}/")
        status, headers, content = 404, {}, b""
        if model == "/someone/small" and name:
            content = (self.folder / name).read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            status = 200
            self.served[name] += self.command == "GET"
        elif path.startswith("/api/models/someone/small/"):
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in self.folder.iterdir()
            ]
            about = {"id": "someone/small", "sha": commit, "siblings": []}
            status, content = 200, json.dumps(files if "/tree/" in path else about).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(folder: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Its address, and how often it has served each file."""
    served: Counter[str] = Counter()
    handler = type("Handler", (Hub,), {"folder": folder, "served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", served
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_name_on_the_hub_is_fetched_once(
    hub: tuple[str, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    address, served = hub
    monkeypatch.setenv("HF_ENDPOINT", address)
    for _ in range(2):
        done = run_python("-c", RUN, "check", "someone/small")
        assert (done.stdout, done.stderr) == ("fine\n", "")
        assert served == {"config.json": 1, "model.safetensors": 1}
    absent = run_python("-c", RUN, "check", "someone/absent").stdout
    assert absent.startswith("UserError feature network dinov2: someone/absent is neither")
    assert absent.endswith("fetched from the hub: HTTP status 404\n")


def test_a_name_that_the_hub_cannot_have_is_one_sentence() -> None:
    for path in ("/absent/folder", ""):
        with pytest.raises(UserError, match="feature network dinov2") as failure:
            build(path)
        assert "\n" not in str(failure.value)
