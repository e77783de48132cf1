"""Training waits only for a copy; a failed write is reported and harms no older checkpoint."""

import errno
import json
import logging
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from ganscale.checkpoints import checkpoint
from ganscale.checkpoints.background_writer import CheckpointWriter
from ganscale.checkpoints.checkpoint import load_state, load_tensors, newest_checkpoint
from ganscale.schema import CheckpointConfig
from tests.helpers.disks import remount, small_disk
from tests.helpers.files import bytes_of, names

Files = dict[str, dict[str, torch.Tensor]]


def files_of(value: float, elements: int = 6) -> Files:
    return {"generator": {"weight": torch.full((elements,), value)}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


class Disk(threading.Event):
    """A disk whose every flush waits for this event."""

    def __init__(self) -> None:
        super().__init__()
        self.has_been_asked = threading.Event()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    is_free, flush = Disk(), os.fsync

    def slow(descriptor: int) -> None:
        is_free.has_been_asked.set()
        assert is_free.wait(60)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    yield is_free
    is_free.set()


def test_changes_after_the_call_do_not_reach_the_checkpoint(root, disk):
    root.mkdir()
    conv = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    tensors = {"conv": conv, "step": torch.tensor(3.0), "tied": conv, "parameter": conv.clone()}
    tensors["parameter"].requires_grad_()
    numbers = {"sessions": [{"world_size": 1}]}
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    writer = CheckpointWriter(root, CheckpointConfig())
    writer.save(5, {"critic": tensors}, numbers)
    assert not list(root.glob("images-*"))  # it returned before anything was written
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    numbers["sessions"].append({"world_size": 2})
    disk.set()
    writer.finish()
    saved = load_tensors(root / "images-000000005", "critic")
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name
    assert load_state(root / "images-000000005") == {"sessions": [{"world_size": 1}]}


def test_the_next_save_waits_for_the_write_in_flight(root, disk):
    root.mkdir()
    writer = CheckpointWriter(root, CheckpointConfig())
    writer.save(1, files_of(1.0), {})
    second = threading.Thread(target=writer.save, args=(2, files_of(2.0), {}))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert not list(root.glob("images-*"))
    disk.set()
    second.join(60)
    writer.finish()
    assert names(root) == ["images-000000001", "images-000000002"]
    for images_seen in (1, 2):  # both were copied into the same memory, one after the other
        saved = load_tensors(root / f"images-00000000{images_seen}", "generator")["weight"]
        assert torch.equal(saved, torch.full((6,), float(images_seen)))


def test_tensors_may_appear_disappear_and_change_their_shape(root):
    writer = CheckpointWriter(root, CheckpointConfig())
    states: list[Files] = [
        {"critic": {}, "generator": {"weight": torch.randn(2, 3)}},
        {"critic": {"0.step": torch.tensor(1.0)}, "generator": {"weight": torch.randn(2, 3)}},
        {"generator": {"weight": torch.randn(5), "bias": torch.randn(1).double()}},
        {"generator": {"weight": torch.arange(5)}},
    ]
    for images_seen, files in enumerate(states):
        writer.save(images_seen, files, {})
    writer.finish()
    for images_seen in (1, 2, 3):
        for file, tensors in states[images_seen].items():
            saved = load_tensors(root / f"images-{images_seen:09d}", file)
            assert saved.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert saved[name].dtype == tensor.dtype
                assert torch.equal(saved[name], tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_from_a_gpu_has_the_values_at_the_call(root, disk):
    root.mkdir()
    weight = torch.zeros(1 << 24, device="cuda")
    writer = CheckpointWriter(root, CheckpointConfig())
    for step in range(200):
        weight += 1
        if step == 99:
            writer.save(1, {"generator": {"weight": weight}}, {})
    disk.set()
    writer.finish()
    assert load_tensors(root / "images-000000001", "generator")["weight"].unique().tolist() == [100]


@contextmanager
def full(root: Path) -> Iterator[None]:
    """No free block."""
    filler = root / "filler"
    with filler.open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        try:
            yield
        finally:
            filler.unlink()


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    remount(root, "ro")
    try:
        yield
    finally:
        remount(root, "rw")


@contextmanager
def not_permitted(root: Path) -> Iterator[None]:
    """As a user that does not own the folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def limited(root: Path) -> Iterator[None]:
    """Files are limited to one KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


OBSTACLES = {
    "full": (full, errno.ENOSPC),
    "read-only": (read_only, errno.EROFS),
    "permission": (not_permitted, errno.EACCES),
    "file size": (limited, errno.EFBIG),
}


@pytest.fixture
def small() -> Iterator[Path]:
    """A file system that other users may read, as pytest's own folders are not."""
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name), "200k,mode=755") as folder:
        yield folder


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("images_seen", [64, 128])  # 64 replaces the existing one
@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_failed_write_is_logged_at_once_and_harms_no_older_checkpoint(
    small, caplog, obstacle, images_seen, on_failure
):
    prevented, code = OBSTACLES[obstacle]
    writer = CheckpointWriter(small, CheckpointConfig(on_failure=on_failure))
    writer.save(64, files_of(1.0), {"images_seen": 64})
    writer.finish()
    old = small / "images-000000064"
    content = bytes_of(old)
    with prevented(small):
        writer.save(images_seen, files_of(2.0, 10_000), {})
        writer.close()
        assert names(small) in ([old.name], ["filler", old.name])
        assert bytes_of(old) == content
        assert newest_checkpoint(small) == old
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    message = record.getMessage()
    assert f"no checkpoint could be written at {images_seen} images" in message
    assert os.strerror(code) in message
    assert writer.should_stop is (on_failure == "stop")
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        writer.finish()
    assert raised.value.errno == code

    writer.save(192, files_of(3.0), {})  # the disk works again
    writer.finish()
    assert not writer.should_stop
    assert names(small) == [old.name, "images-000000192"]


def test_a_folder_deleted_during_a_write_fails_it_and_is_created_again(root, disk, caplog):
    root.mkdir()
    writer = CheckpointWriter(root, CheckpointConfig())
    writer.save(64, files_of(1.0), {})
    assert disk.has_been_asked.wait(60)  # the writer is blocked
    shutil.rmtree(root)
    disk.set()
    with pytest.raises(FileNotFoundError):
        writer.finish()
    assert "no checkpoint could be written at 64 images" in caplog.text
    writer.save(128, files_of(2.0), {})
    writer.finish()
    assert names(root) == ["images-000000128"]


def test_a_deleted_run_folder_is_not_created_for_a_checkpoint(root):
    shutil.rmtree(root.parent)
    writer = CheckpointWriter(root, CheckpointConfig())
    writer.save(64, files_of(1.0), {})
    with pytest.raises(FileNotFoundError):
        writer.finish()
    assert not root.parent.exists()


@pytest.mark.parametrize("images_seen", [128, 192])  # 128 replaces the newest
def test_an_error_in_any_operation_changes_nothing(root, monkeypatch, caplog, images_seen):
    """A stand-in for a disk that fails once, at the n-th operation, for every n."""
    operations = {(os, "fsync"), (os, "open"), (Path, "mkdir"), (Path, "rename"), (Path, "open")}
    left, failed_at = 0, 0

    def failing(call):
        def operation(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*arguments, **options)

        return operation

    while True:
        shutil.rmtree(root, ignore_errors=True)
        writer = CheckpointWriter(root, CheckpointConfig(keep_last=2))
        for images in (64, 128):
            writer.save(images, files_of(float(images)), {})
        writer.finish()
        before = {path.name: bytes_of(path) for path in root.iterdir()}
        failed_at += 1
        with monkeypatch.context() as patched:
            for owner, name in operations:
                patched.setattr(owner, name, failing(getattr(owner, name)))
            left = failed_at
            writer.save(images_seen, files_of(7.0), {})
            writer.close()
        if left > 0:
            break  # fewer operations than that
        after = {path.name: bytes_of(path) for path in root.iterdir()}
        newest = newest_checkpoint(root)
        assert newest is not None
        value = float(load_tensors(newest, "generator")["weight"][0])
        assert (newest.name, value) in [
            ("images-000000128", 128.0),
            (f"images-{images_seen:09d}", 7.0),
        ], failed_at
        if value == 128.0:  # the new one is not in place
            with pytest.raises(OSError, match="Input/output error"):
                writer.finish()
            assert after == before, failed_at
    assert failed_at > 12
    assert "Input/output error" in caplog.text


def test_a_file_that_reads_back_differently_fails_the_write(root, monkeypatch):
    """Memory or a disk that flips one bit after the file is written."""
    writer = CheckpointWriter(root, CheckpointConfig())
    writer.save(64, files_of(1.0), {})
    writer.finish()
    save_tensors = checkpoint.save_tensors

    def flip_a_bit(path, tensors):
        save_tensors(path, tensors)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    monkeypatch.setattr(checkpoint, "save_tensors", flip_a_bit)
    writer.save(128, files_of(2.0), {})
    with pytest.raises(OSError, match="other bits of weight"):
        writer.finish()
    assert names(root) == ["images-000000064"]


def test_an_error_other_than_the_disks_is_raised_by_the_next_save(root):
    writer = CheckpointWriter(root, CheckpointConfig())
    with pytest.raises(TypeError):
        writer.save(1, files_of(1.0), {"not JSON": object()})
    sparse = torch.eye(2).to_sparse()
    writer.save(1, {"generator": {"sparse": sparse}}, {})
    with pytest.raises(Exception, match=r"(?i)sparse|contiguous|memory"):
        writer.save(2, files_of(1.0), {})


def test_checkpoint_files_have_the_permissions_of_the_umask(root):
    writer = CheckpointWriter(root, CheckpointConfig())
    before = os.umask(0o027)
    try:
        writer.save(64, files_of(1.0), {})
        writer.finish()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (root / "images-000000064").iterdir()}
    assert modes == {0o640}


def test_scores_are_stored_and_the_best_checkpoint_is_kept(root, caplog):
    writer = CheckpointWriter(root, CheckpointConfig(keep_last=1, best="logits/wasserstein"))
    scores = [None, 30.0, 10.0, 20.0, float("nan"), [1.0], 10.0, 11.0]
    for images_seen, score in enumerate(scores):
        writer.save(images_seen, files_of(1.0), {"steps": 3}, score)
    writer.finish()
    # The older of equal scores: the later one may be from the same evaluation.
    assert names(root) == ["images-000000002", "images-000000007"]
    state = json.loads((root / "images-000000002" / "state.json").read_text())
    assert state == {"steps": 3, "score": {"name": "logits/wasserstein", "value": 10.0}}
    (record,) = caplog.records
    text = "no row so far has a number `logits/wasserstein`, which checkpoint.best names"
    assert text in record.getMessage()


def test_rows_are_flushed_before_the_checkpoint_they_led_to(root, monkeypatch):
    root.mkdir()
    record, flushed, flush = root.parent / "metrics.jsonl", [], os.fsync
    record.write_text("{}\n")

    def record_flush(descriptor: int) -> None:
        flushed.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), bool(names(root))))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", record_flush)
    writer = CheckpointWriter(root, CheckpointConfig(), flush_first=[record, root / "absent"])
    writer.save(64, files_of(1.0), {})
    writer.finish()
    assert (str(record), False) in flushed  # before there was a checkpoint
