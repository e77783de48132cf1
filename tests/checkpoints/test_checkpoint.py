"""A checkpoint is complete or absent, also with cut or damaged files and full disks."""

import json
import logging
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from ganscale.checkpoints.checkpoint import (
    find_damage,
    load_state,
    load_tensors,
    newest_checkpoint,
)
from ganscale.checkpoints.retention import inspect_checkpoints, prune
from ganscale.schema import CheckpointConfig
from tests.checkpoints.helpers import save_checkpoint
from tests.helpers.disks import small_disk
from tests.helpers.files import bytes_of, names


def weights(seed: int = 0, elements: int = 6) -> dict[str, dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    return {
        "generator": {"layer.weight": torch.randn(elements, generator=draws)},
        "critic": {"layer.weight": torch.randn(2, 3, generator=draws)},
    }


def test_tensors_of_every_kind_are_loaded_bit_by_bit(tmp_path):
    tensors = {
        "float32": torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45]),
        "float64": torch.randn(3, dtype=torch.float64),
        "bfloat16": torch.randn(3).bfloat16(),
        "int64": torch.tensor([2**62, -1]),
        "number": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).T,
        "part of a larger one": torch.randn(100)[10:20:2],
        "with gradient": torch.randn(3, requires_grad=True),
    }
    folder = save_checkpoint(tmp_path, 5, {"critic": tensors}, {})
    loaded = load_tensors(folder, "critic")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert torch.equal(bits(loaded[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def test_a_module_with_tied_and_channels_last_weights_is_restored(tmp_path):
    def network() -> nn.Sequential:
        made = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
        made[1].weight = made[0].weight
        return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    saved, loaded = network(), network()
    folder = save_checkpoint(tmp_path, 5, {"critic": saved.state_dict()}, {})
    loaded.load_state_dict(load_tensors(folder, "critic"))
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].stride() == tensor.stride(), name
    assert loaded[1].weight is loaded[0].weight


def test_the_state_is_loaded_as_plain_numbers(tmp_path):
    state = {
        "images_seen": 10**12,
        "seconds": 0.1 + 0.2,
        "sessions": [{"images_seen": 0, "world_size": 8}],
        "meters": [{"names": ["loss"], "count": 3, "sums": [1e-300]}],
    }
    assert load_state(save_checkpoint(tmp_path, 5, weights(), state)) == state


def test_a_checkpoint_is_named_by_its_images_and_replaced_by_another_save(tmp_path):
    save_checkpoint(tmp_path, 123_456, weights(seed=1), {"images_seen": 123_456})
    assert names(tmp_path) == ["images-000123456"]
    folder = save_checkpoint(tmp_path, 123_456, weights(seed=2), {"images_seen": 123_456})
    assert names(tmp_path) == ["images-000123456"]
    assert torch.equal(
        load_tensors(folder, "generator")["layer.weight"],
        weights(seed=2)["generator"]["layer.weight"],
    )


def test_the_newest_has_the_most_images_however_many_digits(tmp_path):
    for images_seen in (999_999_999, 1_000_000_000, 25_000_000_000, 64):
        save_checkpoint(tmp_path, images_seen, weights(), {})
    assert newest_checkpoint(tmp_path) == tmp_path / "images-25000000000"
    prune(tmp_path, CheckpointConfig(keep_last=2))
    assert names(tmp_path) == ["images-1000000000", "images-25000000000"]


def test_without_checkpoints_there_is_no_newest_one(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "not there") is None
    (tmp_path / "images-of-cats").mkdir()
    (tmp_path / "images-000000064.zip").write_bytes(b"")
    (tmp_path / ".unfinished-images-000000064").mkdir()
    assert newest_checkpoint(tmp_path) is None
    prune(tmp_path, CheckpointConfig(keep_last=1))
    assert len(names(tmp_path)) == 3


def test_a_flipped_bit_in_any_byte_is_detected(tmp_path):
    folder = save_checkpoint(tmp_path, 5, weights(elements=1), {"images_seen": 5})
    assert find_damage(folder) is None
    undetected = []
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(len(whole)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << (position % 8)
            path.write_bytes(flipped)
            if find_damage(folder) is None:
                undetected.append((path.name, position))
        path.write_bytes(whole)
    assert undetected == []
    assert find_damage(folder) is None


def test_truncated_longer_and_missing_files_are_detected(tmp_path):
    folder = save_checkpoint(tmp_path, 5, weights(elements=1), {"images_seen": 5})
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for length in range(0, len(whole), 3):
            path.write_bytes(whole[:length])
            assert find_damage(folder) is not None, (path.name, length)
        path.write_bytes(whole + b"\0")
        assert find_damage(folder) is not None, path.name
        path.unlink()
        assert find_damage(folder) is not None, path.name
        path.write_bytes(whole)
    assert find_damage(folder) is None


@pytest.mark.parametrize("file", ["generator.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_chosen(tmp_path, caplog, file, how):
    for images_seen in (64, 128, 192):
        save_checkpoint(
            tmp_path, images_seen, weights(seed=images_seen), {"images_seen": images_seen}
        )
    path = tmp_path / "images-000000192" / file
    whole = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    with caplog.at_level(logging.WARNING):
        chosen = newest_checkpoint(tmp_path)
    assert chosen == tmp_path / "images-000000128"
    assert chosen is not None
    assert load_state(chosen) == {"images_seen": 128}
    assert names(tmp_path) == ["damaged-images-000000192", "images-000000064", "images-000000128"]
    (record,) = caplog.records
    assert "images-000000192 is damaged (" in record.getMessage()
    assert "set aside as damaged-images-000000192" in record.getMessage()
    assert newest_checkpoint(tmp_path) == chosen
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "checksums",
    [
        *("", "{", "[]", "3", "null", '["state.json"]', '{"state.json": 3}', "[" * 100_000),
        *('{"state.json": {"bytes": 2}}', '{"../run.json": {"bytes": 2, "sha256": "x"}}'),
    ],
)
def test_checksums_of_any_content_are_damage_and_the_file_is_named(tmp_path, caplog, checksums):
    older, newest = (save_checkpoint(tmp_path, n, weights(), {}) for n in (64, 128))
    (newest / "checksums.json").write_text(checksums)
    assert inspect_checkpoints(tmp_path)[1].damage is not None
    assert newest_checkpoint(tmp_path) == older
    assert "images-000000128 is damaged (checksums.json " in caplog.text


def test_what_was_set_aside_stays_when_the_same_checkpoint_is_damaged_again(tmp_path):
    for content in (b"first", b"second"):
        folder = save_checkpoint(tmp_path, 64, weights(), {})
        (folder / "critic.safetensors").write_bytes(content)
        assert newest_checkpoint(tmp_path) is None
    kept = [tmp_path / f"damaged-{which}images-000000064" for which in ("", "2-")]
    assert [(path / "critic.safetensors").read_bytes() for path in kept] == [b"first", b"second"]


def test_when_all_are_damaged_none_is_chosen_and_all_are_kept(tmp_path):
    for images_seen in (64, 128):
        folder = save_checkpoint(tmp_path, images_seen, weights(), {})
        (folder / "critic.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path) is None
    assert names(tmp_path) == ["damaged-images-000000064", "damaged-images-000000128"]


def test_leftovers_of_a_killed_process_are_never_chosen_and_are_removed(tmp_path):
    good = save_checkpoint(tmp_path, 64, weights(), {})
    leftover = tmp_path / ".unfinished-images-000000128"
    shutil.copytree(good, leftover)
    assert newest_checkpoint(tmp_path) == good
    save_checkpoint(tmp_path, 192, weights(), {})
    assert names(tmp_path) == ["images-000000064", "images-000000192"]


def test_an_interrupted_replacement_is_also_undone_by_the_next_save(tmp_path):
    old = save_checkpoint(tmp_path, 64, weights(seed=1), {})
    content = bytes_of(old)
    old.rename(tmp_path / ".replaced-images-000000064")
    save_checkpoint(tmp_path, 128, weights(), {})
    assert names(tmp_path) == ["images-000000064", "images-000000128"]
    assert bytes_of(old) == content


def test_an_unreadable_checkpoint_is_not_treated_as_damaged(tmp_path, monkeypatch):
    """Uses a stand-in, since root may read everything."""
    folder = save_checkpoint(tmp_path, 64, weights(), {})

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refused)
        with pytest.raises(PermissionError):
            newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path) == folder


def assert_old_one_is_unchanged(root: Path, old: Path, content: dict[str, bytes]) -> None:
    assert names(root) == [old.name]
    assert bytes_of(old) == content
    assert newest_checkpoint(root) == old


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "200k") as folder:
        yield folder


def test_a_full_disk_raises_os_error_and_leaves_the_older_checkpoint_unchanged(disk):
    old = save_checkpoint(disk, 64, weights(), {"images_seen": 64})
    content = bytes_of(old)
    for images_seen in (64, 128):  # 64 would replace the old one
        with pytest.raises(OSError, match="No space left on device"):
            save_checkpoint(disk, images_seen, weights(elements=100_000), {})
        assert_old_one_is_unchanged(disk, old, content)
    save_checkpoint(disk, 192, weights(), {})  # and there is room for another small one


def test_a_refused_write_of_any_file_leaves_the_older_checkpoint_unchanged(tmp_path):
    """The kernel limits files to 4 KiB; each time, another file is larger."""
    old = save_checkpoint(tmp_path, 64, weights(), {"images_seen": 64})
    content = bytes_of(old)
    large = torch.zeros(10_000)
    attempts = [
        ({"generator": {"w": large}, "critic": {}}, {}),
        ({"generator": {}, "critic": {"w": large}}, {}),
        (weights(), {"meters": [0.5] * 10_000}),
        ({f"file {i}": {} for i in range(200)}, {}),  # too large a list of checksums
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for files, state in attempts:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_checkpoint(tmp_path, 128, files, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert_old_one_is_unchanged(tmp_path, old, content)


def test_checkpoints_contain_only_safetensors_and_json(tmp_path):
    folder = save_checkpoint(tmp_path, 5, weights(), {"images_seen": 5})
    assert names(folder) == [
        "checksums.json",
        "critic.safetensors",
        "generator.safetensors",
        "state.json",
    ]
    for file in ("checksums.json", "state.json"):
        json.loads((folder / file).read_text())
