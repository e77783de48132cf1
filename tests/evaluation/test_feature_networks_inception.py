"""The Inception file is fetched once for all processes, and only verified bytes are executed.

The real file cannot be had offline; a small module of the same interface stands in.
"""

import hashlib
import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ganscale.errors import UnavailableError, UserError
from ganscale.evaluation.feature_networks.build import (
    build_feature_network,
    check_feature_network,
    network_name,
)
from ganscale.evaluation.feature_networks.feature_network import FeatureNetwork
from ganscale.evaluation.feature_networks.inception import SHA256
from ganscale.evaluation.figures import figure_name
from tests.helpers.disks import small_disk
from tests.helpers.fault_server import Fault, FaultServer
from tests.helpers.processes import HANG_SECONDS, end_tree, wait_until

SHAPE = (3, 16, 16)
PADDING = 3_000_000  # bytes, so that a file is fetched in several pieces


class SmallInception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.dropout = nn.Dropout()
        self.output = nn.Linear(8, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        noise = torch.randint(0, 256, (PADDING,), dtype=torch.uint8, generator=generator)
        self.register_buffer("padding", noise)

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> Tensor:
        assert img.shape[1] == 3
        x = (F.interpolate(img.to(torch.float32), [29, 29], mode="bilinear") - 128) / 128
        features = self.dropout(self.convolution(x).relu().mean((2, 3)))
        if return_features:
            return features
        if no_output_bias:
            return F.linear(features, self.output.weight).softmax(1)
        return self.output(features).softmax(1)


def script(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module.eval())


def saved(module: nn.Module) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(script(module), stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def content() -> bytes:
    return saved(SmallInception())


@pytest.fixture
def server(content: bytes) -> Iterator[FaultServer]:
    with FaultServer().running() as server:
        server.objects["/inception.pt"] = content
        yield server


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def build(
    path: str,
    sha256: str,
    cache: Path,
    shape: tuple[int, int, int] = SHAPE,
    retry_seconds: float = 0.0,
) -> FeatureNetwork:
    options = {"path": path, "sha256": sha256}
    place: dict[str, Any] = {
        "sample_shape": shape,
        "cache": cache,
        "retry_seconds": retry_seconds,
    }
    check_feature_network("inception", options, **place)
    return build_feature_network("inception", options, device=torch.device("cpu"), **place)


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_features_and_classes_are_those_of_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "inception.pt"
    path.write_bytes(content)
    network = build(str(path), digest(content), tmp_path / "cache")
    assert (network.dim, network.num_classes) == (8, 5)
    assert network.checksum == digest(content)
    batch, module = images(5, *SHAPE), script(SmallInception())
    for _ in range(4):  # TorchScript optimizes after the first calls
        found = network(batch)
        torch.testing.assert_close(found.features, module(batch, return_features=True))
        expected = module(batch, no_output_bias=True)  # as StyleGAN's Inception Score
        torch.testing.assert_close(found.probabilities, expected)
        assert torch.equal(found.features, network(batch.clone()).features)
    grey = images(5, 1, 16, 16)
    of_grey = build(str(path), digest(content), tmp_path / "cache", (1, 16, 16))(grey)
    assert torch.equal(of_grey.features, network(grey.repeat(1, 3, 1, 1)).features)
    assert not (tmp_path / "cache").exists()


def test_a_file_from_a_server_is_fetched_once_and_kept(
    content: bytes, server: FaultServer, tmp_path: Path
) -> None:
    url, cache = f"{server.url}/inception.pt", tmp_path / "cache"
    first = build(url, digest(content), cache)
    assert server.gets["/inception.pt"] == 1
    server.objects.clear()  # nor is it needed any more
    again = build(url, digest(content), cache)
    assert torch.equal(first(images(2, *SHAPE)).features, again(images(2, *SHAPE)).features)
    assert server.gets["/inception.pt"] == 1
    assert files(cache) == {digest(content), f"{digest(content)}.lock"}


def test_a_damaged_copy_is_fetched_again(
    content: bytes, server: FaultServer, tmp_path: Path
) -> None:
    url = f"{server.url}/inception.pt"
    build(url, digest(content), tmp_path)
    copy = tmp_path / "feature_networks" / digest(content)
    copy.write_bytes(content[:-1] + b"?")
    build(url, digest(content), tmp_path)
    assert copy.read_bytes() == content
    assert server.gets["/inception.pt"] == 2


def test_a_connection_that_is_cut_is_continued(
    content: bytes, server: FaultServer, tmp_path: Path
) -> None:
    faults = [Fault(status=503), Fault(cut_after=100_000), Fault(cut_after=50_000)]
    server.faults["/inception.pt"].extend(faults)
    network = build(f"{server.url}/inception.pt", digest(content), tmp_path, retry_seconds=60.0)
    assert network.checksum == digest(content)


def test_another_file_is_neither_executed_nor_kept(
    content: bytes, server: FaultServer, tmp_path: Path
) -> None:
    path = tmp_path / "inception.pt"
    path.write_bytes(content)
    for location in (str(path), f"{server.url}/inception.pt"):
        with pytest.raises(UserError, match=f"its SHA-256 is {digest(content)}, not {SHA256}"):
            build(location, SHA256, tmp_path / "cache")
    assert files(tmp_path / "cache") == {f"{SHA256}.lock"}


FETCH = """
import sys
from pathlib import Path
from ganscale.evaluation.feature_networks.weights_file import read_weights
location, checksum, cache = sys.argv[1:]
print(len(read_weights(location, checksum, Path(cache), 60.0)))
"""


@pytest.fixture
def fetch(content: bytes, server: FaultServer, tmp_path: Path) -> Iterator[Callable]:
    """Starts a process that fetches the file into tmp_path."""
    processes = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", FETCH, f"{server.url}/inception.pt", digest(content)]
        process = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        end_tree(process)
        process.wait(HANG_SECONDS)
        process.stdout.close()


def test_processes_that_start_together_fetch_a_file_once(
    content: bytes, server: FaultServer, fetch: Callable
) -> None:
    server.faults["/inception.pt"].append(Fault(seconds_a_piece=0.002))
    processes = [fetch() for _ in range(3)]
    lengths = [int(process.communicate(timeout=HANG_SECONDS)[0]) for process in processes]
    assert lengths == [len(content)] * 3
    assert server.gets["/inception.pt"] == 1


def test_a_process_that_is_killed_meanwhile_leaves_nothing_in_the_way(
    content: bytes, server: FaultServer, fetch: Callable, tmp_path: Path
) -> None:
    server.faults["/inception.pt"].append(Fault(stall_after=2_500_000))
    process = fetch()
    wait_until(lambda: any(name.endswith(".partial") for name in files(tmp_path)), process=process)
    process.kill()
    process.wait(HANG_SECONDS)
    build(f"{server.url}/inception.pt", digest(content), tmp_path)
    assert files(tmp_path) == {digest(content), f"{digest(content)}.lock"}


def test_a_full_cache_is_one_sentence(content: bytes, server: FaultServer, tmp_path: Path) -> None:
    with small_disk(tmp_path / "cache", "1m") as cache:
        for server.has_length in (True, False):
            with pytest.raises(UserError, match=r"no space in data\.cache=.* the disk is full"):
                build(f"{server.url}/inception.pt", digest(content), cache)
        assert files(cache) == {f"{digest(content)}.lock"}


def test_a_cache_that_cannot_be_written_is_one_sentence(
    content: bytes, server: FaultServer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache=.*file cannot be written"):
        build(f"{server.url}/inception.pt", digest(content), tmp_path / "file")


def test_a_server_that_stays_away_asks_for_a_requeue(
    content: bytes, server: FaultServer, tmp_path: Path
) -> None:
    server.faults["/inception.pt"].extend([Fault(status=503)] * 50)
    with pytest.raises(UnavailableError, match=r"copy the file to this machine and set .* path"):
        build(f"{server.url}/inception.pt", digest(content), tmp_path)


class WithoutFeatures(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


class WithoutLayer(nn.Module):
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images


@pytest.mark.parametrize("module", [WithoutFeatures(), WithoutLayer()])
def test_a_file_with_another_interface_is_one_sentence(module: nn.Module, tmp_path: Path) -> None:
    content = saved(module)
    path = tmp_path / "module.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a network like StyleGAN's Inception"):
        build(str(path), digest(content), tmp_path)


def test_a_file_that_is_not_torchscript_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "pickle.pt"
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match="is not in the TorchScript format"):
        build(str(path), digest(path.read_bytes()), tmp_path)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"path": "/absent.pt"}, "feature network inception: /absent.pt cannot be read: No such"),
        ({"path": "/"}, "cannot be read: Is a directory"),
        ({"path": ""}, "path= of feature network inception must be a file or address"),
        ({"path": 3}, "path=3 of"),
        ({"sha256": "abc"}, "sha256=abc of feature network inception must be 64 hexadecimal"),
        ({"checksum": "abc"}, "no option 'checksum'; choose from path, sha256"),
    ],
)
def test_a_wrong_option_is_one_sentence(options: dict, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as failure:
        check_feature_network(
            "inception", options, sample_shape=SHAPE, cache=tmp_path, retry_seconds=0.0
        )
    assert "\n" not in str(failure.value)


def test_only_the_published_file_gives_fid() -> None:
    """Its distances are FID wherever it lies; those of another file are another metric."""
    ours = network_name("inception", {"path": "/elsewhere/inception.pt"})
    other = network_name("inception", {"sha256": "0a1b2c3d" + 56 * "0"})
    assert figure_name("fd", ours) == "eval/fid"
    assert figure_name("fd", other) == "eval/fd_inception-0a1b2c3d"
