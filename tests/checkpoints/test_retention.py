"""Which checkpoints are kept; an undamaged one always is."""

import json
import os

import pytest
import torch

from ganscale.checkpoints.retention import inspect_checkpoints, prune, score_entry
from ganscale.schema import CheckpointConfig
from tests.checkpoints.helpers import save_checkpoint


def names(root) -> list[int]:
    return sorted(int(path.name[-9:]) for path in root.glob("images-*"))


def save(root, images_seen, score=None, name="logits/wasserstein"):
    files = {"generator": {"weight": torch.full((4,), float(images_seen))}}
    return save_checkpoint(root, images_seen, files, score_entry(name, score))


def flip_a_bit(folder):
    """Damage that does not change the file's size."""
    path = folder / "generator.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, [600]),
        (3, 0, [400, 500, 600]),
        (99, 0, [100, 200, 300, 400, 500, 600]),
        (1, 200, [200, 400, 600]),
        (2, 300, [300, 500, 600]),
        (1, 1000, [600]),
    ],
)
def test_the_newest_and_the_multiples_are_kept(tmp_path, keep_last, keep_every, kept):
    for images_seen in range(100, 700, 100):
        save(tmp_path, images_seen)
    keep = CheckpointConfig(keep_last=keep_last, keep_every_images=keep_every)
    deleted = prune(tmp_path, keep)
    assert names(tmp_path) == kept
    assert {info.images_seen for info in deleted} == {*range(100, 700, 100)} - {*kept}


def test_between_multiples_the_next_checkpoint_is_kept_whenever_prune_runs(tmp_path):
    """Ends of cycles rarely are multiples: those of 96 images, with 200 asked for."""
    keep = CheckpointConfig(keep_last=1, keep_every_images=200)
    for images_seen in range(96, 1000, 96):
        save(tmp_path, images_seen)
        prune(tmp_path, keep)
    assert names(tmp_path) == [288, 480, 672, 864, 960]


@pytest.mark.parametrize(
    ("scores", "best_is", "best"),
    [
        ([5.0, 3.0, 4.0, 9.0], "lowest", 1),
        ([5.0, 3.0, 4.0, 9.0], "highest", 3),
        ([5.0, 3.0, 3.0, 9.0], "lowest", 1),  # the oldest of equal ones
        ([None, -3.0, float("nan"), float("-inf")], "lowest", 1),
        ([None, None, None, None], "lowest", None),
    ],
)
def test_the_checkpoint_with_the_best_score_is_kept(tmp_path, scores, best_is, best):
    for images_seen, score in enumerate(scores):
        save(tmp_path, images_seen, score)
    save(tmp_path, 9)
    prune(tmp_path, CheckpointConfig(keep_last=1, best="logits/wasserstein", best_is=best_is))
    assert names(tmp_path) == ([9] if best is None else [best, 9])


def test_a_score_with_another_name_does_not_count(tmp_path):
    save(tmp_path, 1, 1.0, "loss/critic")
    save(tmp_path, 2, 7.0)
    save(tmp_path, 3)
    prune(tmp_path, CheckpointConfig(keep_last=1, best="logits/wasserstein"))
    assert names(tmp_path) == [2, 3]


def test_a_truncated_best_checkpoint_does_not_count(tmp_path):
    for images_seen, score in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
        save(tmp_path, images_seen, score)
    cut = tmp_path / "images-000000002" / "generator.safetensors"
    os.truncate(cut, 10)
    prune(tmp_path, CheckpointConfig(keep_last=1, best="logits/wasserstein"))
    assert names(tmp_path) == [1, 2, 4]  # the damaged one is left for inspection


def test_inspection_does_not_read_the_tensors(tmp_path):
    save(tmp_path, 7, 1.5)
    cut, empty = save(tmp_path, 8), tmp_path / "images-000000009"
    os.truncate(cut / "generator.safetensors", 10)
    empty.mkdir()
    flip_a_bit(save(tmp_path, 10))
    whole, truncated, empty_folder, flipped = inspect_checkpoints(tmp_path)
    files = [*whole.folder.glob("*.safetensors"), whole.folder / "state.json"]
    assert whole.bytes == sum(path.stat().st_size for path in files)
    assert whole.score == ("logits/wasserstein", 1.5)
    assert whole.damage is None
    assert abs(whole.written_at - whole.folder.stat().st_mtime) < 1
    assert truncated.damage is not None
    assert "generator.safetensors has 10 bytes instead of" in truncated.damage
    assert empty_folder.damage is not None
    assert flipped.damage is None  # only `verify` detects that


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"score": 3}', '{"score": {"name": 1}}'])
def test_an_invalid_state_counts_as_damage(tmp_path, content):
    folder = save(tmp_path, 7, 1.5)
    sums = json.loads((folder / "checksums.json").read_text())
    sums["state.json"]["bytes"] = len(content)
    (folder / "state.json").write_text(content)
    (folder / "checksums.json").write_text(json.dumps(sums))
    (saved,) = inspect_checkpoints(tmp_path)
    assert saved.score is None
    assert (saved.damage is None) is (content == "{}")


def test_the_only_undamaged_checkpoint_is_kept_whatever_the_settings(tmp_path):
    for images_seen in (1, 2, 3, 4):
        save(tmp_path, images_seen)
    flip_a_bit(tmp_path / "images-000000003")
    flip_a_bit(tmp_path / "images-000000004")
    keep = CheckpointConfig(keep_last=2)
    assert [info.images_seen for info in prune(tmp_path, keep, dry_run=True)] == [1]
    assert names(tmp_path) == [1, 2, 3, 4]
    prune(tmp_path, keep)
    assert names(tmp_path) == [2, 3, 4]
    flip_a_bit(tmp_path / "images-000000002")
    assert prune(tmp_path, CheckpointConfig(keep_last=1)) == []
    assert names(tmp_path) == [2, 3, 4]


def test_the_one_just_written_is_kept_even_beside_newer_names(tmp_path):
    for images_seen in (8, 9, 2):
        written = save(tmp_path, images_seen)
    prune(tmp_path, CheckpointConfig(keep_last=1), verified=written)
    assert names(tmp_path) == [2, 9]
