"""Tars are read as the standard library reads them, and all damage is noticed."""

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ganscale.errors import UserError
from ganscale.shards.shard_index import is_image, pixel_size
from ganscale.shards.tar_reader import TarReader

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]

# Any valid file name: letters of all scripts, spaces, and names of hundreds of bytes.
parts = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=60)
names = st.lists(parts, min_size=1, max_size=6).map("/".join)
members = st.lists(st.tuples(names, st.binary(max_size=1600)), max_size=8)


class Trickle(io.RawIOBase):
    """A stream like that of a network: it cannot seek, and returns fewer bytes than asked for."""

    def __init__(self, content: bytes, step: int):
        self._stream, self._step = io.BytesIO(content), step

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(min(size, self._step))

    def seekable(self) -> bool:
        return False


def write(files: list[tuple[str, bytes]], tar_format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for number, (name, data) in enumerate(files):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), number / 3  # pax writes such a time as a record
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def oracle(content: bytes) -> list[tuple[str, int, int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        return [
            (member.name, member.offset_data, member.size, tar.extractfile(member).read())  # type: ignore[union-attr]
            for member in tar
            if member.isfile()
        ]


def read(file: io.IOBase) -> list[tuple[str, int, int, bytes]]:
    return read_all(TarReader(file, "a.tar"))  # type: ignore[arg-type]


def read_all(reader: TarReader) -> list[tuple[str, int, int, bytes]]:
    return [(*member, reader.data()) for member in reader]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(files=members, tar_format=st.sampled_from(FORMATS), step=st.sampled_from([1 << 20, 700]))
def test_any_tar_is_read_as_tarfile_reads_it(files, tar_format, step):
    try:
        content = write(files, tar_format)
    except ValueError:  # the name is too long for ustar
        return
    expected = oracle(content)
    reader = TarReader(Trickle(content, step), "a.tar", with_sha256=True)  # type: ignore[arg-type]
    assert read_all(reader) == expected
    assert reader.sha256 == hashlib.sha256(content).hexdigest()
    assert read(io.BytesIO(content)) == expected


@settings(deadline=None, max_examples=150)
@given(
    files=st.lists(st.tuples(parts, st.binary(max_size=1600)), min_size=1, max_size=4),
    tar_format=st.sampled_from(FORMATS),
    data=st.data(),
)
def test_every_flipped_header_byte_and_every_cut_is_noticed(files, tar_format, data):
    """Either all members are read, or an error is raised: nothing is lost silently."""
    try:
        content = bytearray(write(files, tar_format))
    except ValueError:
        return
    expected = [member[1:3] for member in oracle(bytes(content))]
    end = max(offset + size for offset, size in expected)
    if data.draw(st.booleans(), label="is cut"):
        content = content[: data.draw(st.integers(0, end), label="length")]
        with pytest.raises(UserError, match=r"^a\.tar: "):
            read(io.BytesIO(bytes(content)))
        return
    first, _ = data.draw(st.sampled_from(expected), label="member")
    position = data.draw(st.integers(first - 512, first - 1), label="position")
    content[position] ^= data.draw(st.integers(1, 255), label="flip")
    for stream in (io.BytesIO(bytes(content)), Trickle(bytes(content), 700)):
        try:
            found = [member[1:3] for member in read(stream)]
        except UserError:
            continue
        assert found == expected


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_read(tmp_path, form):
    """A folder, names in other scripts, and one of 150 bytes where the format can hold it."""
    files = {"kätzchen 猫.png": b"1" * 700, "d/b.cls": b"3"}
    if form not in ("v7",):
        files["x" * 70 + "/" + "y" * 70 + ".png"] = b"2"
    for name, data in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shard = tmp_path / "a.tar"
    command = ["tar", f"--format={form}", "-cf", str(shard), "-C", str(tmp_path / "in"), "."]
    subprocess.run(command, check=True, timeout=300)
    with shard.open("rb") as file:
        found = {name.removeprefix("./"): data for name, _, _, data in read(file)}
    assert found == files


def test_a_size_that_octal_digits_cannot_hold_is_read(tmp_path):
    """In base 256 (GNU) and as a pax record; the file is a 9 GiB hole."""
    size = 9 << 30
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{tar_format}.tar"
        with path.open("wb") as file:
            member = tarfile.TarInfo("0.bin")
            member.size = size
            header = member.tobuf(tar_format)
            file.write(header)
            file.truncate(len(header) + size + 1024)
        with path.open("rb") as file:
            assert list(TarReader(file, "a.tar")) == [("0.bin", len(header), size)]


def test_sparse_files_links_and_unknown_types_are_refused(tmp_path):
    (tmp_path / "0.png").touch()
    os.truncate(tmp_path / "0.png", 1 << 20)
    for form in ("gnu", "posix"):
        shard = tmp_path / f"{form}.tar"
        command = ["tar", f"--format={form}", "-cSf", str(shard), "-C", str(tmp_path), "0.png"]
        subprocess.run(command, check=True, timeout=300)
        with shard.open("rb") as file, pytest.raises(UserError, match="is a link or sparse"):
            read(file)
    for kind, sentence in ((tarfile.LNKTYPE, "is a link"), (b"Z", "has the unknown type b'Z'")):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            member = tarfile.TarInfo("0.png")
            member.type = kind
            tar.addfile(member)
        stream.seek(0)
        with pytest.raises(UserError, match=sentence):
            read(stream)


def test_folders_and_devices_are_skipped_and_pax_defaults_apply():
    stream = io.BytesIO()
    headers = {"comment": "for all members"}
    with tarfile.open(fileobj=stream, mode="w", pax_headers=headers) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("p", tarfile.FIFOTYPE), ("n", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            tar.addfile(member)
        member = tarfile.TarInfo("0.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    assert read(io.BytesIO(stream.getvalue())) == oracle(stream.getvalue())


def test_a_folder_in_an_old_tar_is_not_a_file():
    """Before POSIX, a folder was a file whose name ends with a slash."""
    stream = io.BytesIO()
    for name in ("d/", "d/0.png"):
        member = tarfile.TarInfo(name)
        member.type = tarfile.AREGTYPE
        header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
        header[148:156] = b" " * 8
        header[257:265] = bytes(8)  # no magic: of the seventh edition
        header[148:156] = b"%06o\0 " % sum(header)
        stream.write(header)
    content = stream.getvalue() + bytes(1024)
    assert [name for name, *_ in read(io.BytesIO(content))] == ["d/0.png"]
    assert read(io.BytesIO(content)) == oracle(content)


def test_a_file_that_is_not_a_tar_is_recognized():
    whole = write([("0.png", b"1")], tarfile.GNU_FORMAT)
    for content, sentence in (
        (b"", "the file is empty"),
        (b"<html>" * 200, "does not begin with a tar header"),
        (gzip.compress(whole), r"it is compressed \(gzip\); .*unpack it"),
        (b"\x28\xb5\x2f\xfd" + whole, r"it is compressed \(zstd\)"),
    ):
        with pytest.raises(UserError, match=f"^a.tar: not a readable tar.*{sentence}"):
            read(io.BytesIO(content))


def test_a_name_of_absurd_length_does_not_fill_memory():
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    first = write([("0.png", b"1")], tarfile.GNU_FORMAT)[:1024]
    stream = io.BytesIO(first + header.tobuf(tarfile.GNU_FORMAT) + bytes(32 << 20))
    with pytest.raises(UserError, match="damaged at byte 1,024"):
        read(Trickle(stream.getvalue(), 1 << 20))
    with pytest.raises(UserError, match="damaged at byte 1,024"):
        read(stream)
    assert stream.tell() <= 2 << 20


def test_pixel_sizes_agree_with_the_decoder():
    """For every format and orientation; a damaged header gives None, or what Pillow finds."""
    import numpy as np
    from PIL import Image

    from ganscale.data.images.decoding import DecodeError, image_size

    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    image = Image.fromarray(random.integers(0, 256, (13, 29, 3), dtype=np.uint8))
    for kind, options in (
        ("PNG", {}),
        ("PNG", {"exif": exif}),
        ("JPEG", {}),
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("npy", {}),
    ):
        stream = io.BytesIO()
        if kind == "npy":
            np.save(stream, np.asarray(image))
        else:
            image.save(stream, kind, **options)
        data = stream.getvalue()
        assert is_image(data[:12])
        assert (
            pixel_size(data) == image_size(data) == ((29, 13) if options.get("exif") else (13, 29))
        )
        for position in range(min(len(data), 64)):
            damaged = bytearray(data)
            damaged[position] ^= 0x55
            try:
                expected = image_size(bytes(damaged))
            except DecodeError:
                expected = None
            found = pixel_size(bytes(damaged))
            assert found in (expected, (13, 29)), (kind, position)
    assert not is_image(b"GIF89a")
    assert not is_image(b"RIFF\0\0\0\0WAVE")
    assert pixel_size(b"\xff\xd8\xff") is None


def test_the_bytes_of_a_member_are_read_only_when_asked_for(tmp_path: Path):
    """Listing a tar of photographs reads its headers, not its gigabytes."""
    path = tmp_path / "a.tar"
    path.write_bytes(write([(f"{i}.png", bytes(8 << 20)) for i in range(4)], tarfile.GNU_FORMAT))
    with path.open("rb", buffering=0) as file:
        read_bytes = 0

        class Counting:
            def read(self, size: int, /) -> bytes:
                nonlocal read_bytes
                data = file.read(size) or b""
                read_bytes += len(data)
                return data

            def seekable(self) -> bool:
                return True

            seek = file.seek

        assert len(list(TarReader(Counting(), "a.tar"))) == 4
    assert read_bytes < 8 << 20
