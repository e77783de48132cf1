"""Which checkpoints stay, and that a whole one always does."""

import json
import os

import pytest
import torch

from ganscale.checkpoints.retention import inspect_checkpoints, prune, score_entry
from ganscale.schema import CheckpointConfig
from tests.checkpoints.saving import save_checkpoint


def names(root) -> list[int]:
    return sorted(int(path.name[-9:]) for path in root.glob("images-*"))


def save(root, images_seen, score=None, name="eval/fid"):
    files = {"generator": {"weight": torch.full((4,), float(images_seen))}}
    return save_checkpoint(root, images_seen, files, score_entry(name, score))


def damage_quietly(folder):
    """One bit, which no size shows."""
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
def test_the_last_ones_and_the_multiples_stay(tmp_path, keep_last, keep_every, kept):
    for images_seen in range(100, 700, 100):
        save(tmp_path, images_seen)
    keep = CheckpointConfig(keep_last=keep_last, keep_every_images=keep_every)
    gone = prune(tmp_path, keep)
    assert names(tmp_path) == kept
    assert {each.images_seen for each in gone} == {*range(100, 700, 100)} - {*kept}


@pytest.mark.parametrize(
    ("scores", "best_is", "best"),
    [
        ([5.0, 3.0, 4.0, 9.0], "lowest", 1),
        ([5.0, 3.0, 4.0, 9.0], "highest", 3),
        ([5.0, 3.0, 3.0, 9.0], "lowest", 1),  # of equal ones the oldest
        ([None, -3.0, float("nan"), float("-inf")], "lowest", 1),
        ([None, None, None, None], "lowest", None),
    ],
)
def test_the_best_by_its_score_stays(tmp_path, scores, best_is, best):
    for images_seen, score in enumerate(scores):
        save(tmp_path, images_seen, score)
    save(tmp_path, 9)
    prune(tmp_path, CheckpointConfig(keep_last=1, best="eval/fid", best_is=best_is))
    assert names(tmp_path) == ([9] if best is None else [best, 9])


def test_a_score_of_another_name_is_none(tmp_path):
    save(tmp_path, 1, 1.0, "loss/critic")
    save(tmp_path, 2, 7.0)
    save(tmp_path, 3)
    prune(tmp_path, CheckpointConfig(keep_last=1, best="eval/fid"))
    assert names(tmp_path) == [2, 3]


def test_the_best_that_is_cut_short_does_not_count(tmp_path):
    for images_seen, score in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
        save(tmp_path, images_seen, score)
    cut = tmp_path / "images-000000002" / "generator.safetensors"
    os.truncate(cut, 10)
    prune(tmp_path, CheckpointConfig(keep_last=1, best="eval/fid"))
    assert names(tmp_path) == [1, 2, 4]  # the damaged one is left to be looked at


def test_what_is_seen_without_reading_the_tensors(tmp_path):
    save(tmp_path, 7, 1.5)
    cut, empty = save(tmp_path, 8), tmp_path / "images-000000009"
    os.truncate(cut / "generator.safetensors", 10)
    empty.mkdir()
    damage_quietly(save(tmp_path, 10))
    whole, damaged, nothing, quietly = inspect_checkpoints(tmp_path)
    files = [*whole.folder.glob("*.safetensors"), whole.folder / "state.json"]
    assert whole.bytes == sum(path.stat().st_size for path in files)
    assert whole.score == ("eval/fid", 1.5)
    assert whole.damage is None
    assert abs(whole.written_at - whole.folder.stat().st_mtime) < 1
    assert damaged.damage is not None
    assert "generator.safetensors has 10 bytes instead of" in damaged.damage
    assert nothing.damage is not None
    assert quietly.damage is None  # `verify` is for that


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"score": 3}', '{"score": {"name": 1}}'])
def test_a_state_that_is_none_is_a_fault_and_no_crash(tmp_path, content):
    folder = save(tmp_path, 7, 1.5)
    sums = json.loads((folder / "checksums.json").read_text())
    sums["state.json"]["bytes"] = len(content)
    (folder / "state.json").write_text(content)
    (folder / "checksums.json").write_text(json.dumps(sums))
    (saved,) = inspect_checkpoints(tmp_path)
    assert saved.score is None
    assert (saved.damage is None) is (content == "{}")


def test_the_only_one_that_verifies_stays_whatever_the_settings_say(tmp_path):
    for images_seen in (1, 2, 3, 4):
        save(tmp_path, images_seen)
    damage_quietly(tmp_path / "images-000000003")
    damage_quietly(tmp_path / "images-000000004")
    keep = CheckpointConfig(keep_last=2)
    assert [each.images_seen for each in prune(tmp_path, keep, dry_run=True)] == [1]
    assert names(tmp_path) == [1, 2, 3, 4]
    prune(tmp_path, keep)
    assert names(tmp_path) == [2, 3, 4]
    damage_quietly(tmp_path / "images-000000002")
    assert prune(tmp_path, CheckpointConfig(keep_last=1)) == []
    assert names(tmp_path) == [2, 3, 4]


def test_the_one_just_written_stays_even_where_newer_names_lie(tmp_path):
    for images_seen in (8, 9, 2):
        written = save(tmp_path, images_seen)
    prune(tmp_path, CheckpointConfig(keep_last=1), verified=written)
    assert names(tmp_path) == [2, 9]
