"""No image of a source is lost without a word, and no file of it makes the command hang."""

import os
import shutil
import socket
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ganscale.data.images.decoding import decode
from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.shards.writing import write_shards
from tests.helpers.images import encoded, noise, png
from tests.helpers.processes import HANG_SECONDS
from tests.helpers.tars import write_tar
from tests.shards.test_source_classes import as_folder, as_tar, as_zip, labelled

WITHOUT_ROOTS_RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
AS_ANY_USER = WITHOUT_ROOTS_RIGHTS if os.geteuid() == 0 else ()


def write(*arguments: object) -> tuple[int, str, str]:
    return shards("write", *arguments)


def shards(*arguments: object, prefix: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `ganscale shards`."""
    command = [*prefix, sys.executable, "-m", "ganscale", "shards", *map(str, arguments)]
    process = subprocess.run(
        [*command, "--workers", "1"],
        capture_output=True, text=True, timeout=HANG_SECONDS, errors="surrogateescape",
    )  # fmt: skip
    return process.returncode, process.stdout, process.stderr


def pixels(manifest: Manifest, images: dict[bytes, int]) -> set[bytes]:
    return {decode(data, None, 3).tobytes() for data in images}


@pytest.fixture
def closed(tmp_path) -> Iterator[Path]:
    """A folder without any permission."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("needs setpriv (Debian: util-linux)")
    folder = tmp_path / "source" / "bee"
    folder.mkdir(parents=True)
    folder.chmod(0o000)
    yield folder
    folder.chmod(0o755)


def damaged_zips(folder: Path) -> dict[str, str]:
    """Zips that cannot be read, with what is said of them."""
    archive = folder / "source.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as file:
        for number in range(6):
            file.writestr(f"{number}.png", png(number))
    whole = archive.read_bytes()
    directory = whole.index(b"PK\1\2")
    encrypted, deflate64, extra, data = (bytearray(whole) for _ in range(4))
    encrypted[directory + 8] |= 1
    deflate64[directory + 10] = 9
    extra[directory + 30 : directory + 32] = b"\xff\xff"
    data[60:directory:7] = b"?" * len(data[60:directory:7])
    zips = {
        "cut short": whole[:-300],
        "its beginning is missing": whole[100:],
        "is encrypted: unpack it": encrypted,
        "9 is Deflate64": deflate64,
        "is a damaged zip": extra,
        "images cannot be decoded": data,
    }
    for sentence, content in zips.items():
        (folder / f"{sentence[:6]}.zip").write_bytes(content)
    return {str(folder / f"{sentence[:6]}.zip"): sentence for sentence in zips}


def test_zips_that_cannot_be_read_are_named_with_the_reason(tmp_path):
    for path, sentence in damaged_zips(tmp_path).items():
        with pytest.raises(UserError, match=sentence):
            write_shards(path, tmp_path / "shards" / Path(path).stem)


@pytest.mark.parametrize("options", [(), ("--classes", "folder")])
def test_a_folder_that_cannot_be_listed_is_an_error_and_no_class_is_lost(
    closed: Path, tmp_path, options: tuple[str, ...]
):
    files = {f"{name}/{i}.png": png(i) for name in ("ant", "cat") for i in range(2)}
    source = as_folder(closed.parent, files)
    code, _, stderr = shards("write", source, tmp_path / "1", *options, prefix=AS_ANY_USER)
    assert (code, stderr) == (2, f"error: cannot list the folder {closed}: Permission denied\n")
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("pattern", ["bee", "bee/*.tar", "*/*.tar", "b*/a.tar"])
def test_shards_in_a_folder_that_cannot_be_listed_are_not_left_out(
    closed: Path, tmp_path, pattern: str
):
    write_tar(closed.parent / "ant" / "a.tar", [("0.png", png(0))])
    command = ("index", closed.parent / pattern, "--output", tmp_path / "1")
    code, _, stderr = shards(*command, prefix=AS_ANY_USER)
    assert (code, stderr) == (2, f"error: cannot list the folder {closed}: Permission denied\n")


def test_images_of_one_name_in_an_archive_are_all_stored(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        warnings.simplefilter("ignore")  # of the duplicate name
        for i in range(3):
            archive.writestr("photo.png", png(i))
    result = write_shards(str(tmp_path / "a.zip"), tmp_path / "1")
    assert set(labelled(result)) == {png(0), png(1), png(2)}
    assert result.notes == ["names of several images, which are all stored: 1, as photo.png"]


def test_images_of_formats_that_training_does_not_read_are_stored_as_png(tmp_path):
    """Of a mixed folder, also under a wrong name and in other pixel types."""
    pictures = [noise(i, 8) for i in range(8)]
    grey = pictures[6][:, :, 0]
    files = {
        "a.bmp": encoded(pictures[0], "BMP"),
        "b.TIFF": encoded(pictures[1], "TIFF"),
        "c.ppm": encoded(pictures[2], "PPM"),
        "d.tga": encoded(pictures[3], "TGA"),
        "e.jpg": encoded(pictures[4], "BMP"),
        "f.png": encoded(pictures[5]),
        "g.tif": encoded(grey.astype(np.uint16) << 8, "TIFF"),
    }
    source = as_folder(tmp_path / "a", files)
    result = write_shards(source, tmp_path / "1")
    expected = [*pictures[:6], np.stack([grey] * 3, axis=2)]
    images = labelled(result)
    assert pixels(result.manifest, images) == {picture.tobytes() for picture in expected}
    assert files["f.png"] in images
    assert (result.manifest.extensions, result.ignored) == (("png",), {})
    assert result.notes == [
        "BMP files are stored as PNG: 2",
        "PPM files are stored as PNG: 1",
        "TGA files are stored as PNG: 1",
        "TIFF files are stored as PNG: 2",
    ]
    again = write_shards(source, tmp_path / "1")
    assert (again.kept_shards, again.notes) == (1, result.notes)
    resized = write_shards(source, tmp_path / "2", resolution=8)
    assert (len(resized.manifest.samples), resized.notes) == (7, [])


@pytest.mark.parametrize("pack", [as_folder, as_zip, as_tar])
def test_images_without_the_extension_of_one_are_stored(tmp_path, pack):
    """As `wget` and browsers leave them; a label is never taken for one."""
    names = ("photo", "b.jpg?w=300", "c.jpg_large", "d.JPG~")
    files = {name: png(i) for i, name in enumerate(names)}
    others = {"notes": b"x", "e.txt": png(8), "empty": b""}
    result = write_shards(pack(tmp_path / "source", files | others), tmp_path / "1")
    assert set(labelled(result)) == set(files.values())
    assert result.ignored == {"(no extension)": 2, "txt": 1}


def test_what_cannot_be_decoded_counts_as_a_bad_image_not_as_another_file(tmp_path):
    files = {f"{i}.png": png(i) for i in range(8)}
    files |= {"a.heic": b"\0\0\0\x18ftypheic", "b.gif": b"GIF89a?"}
    files["c.tiff"] = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    source = as_folder(tmp_path / "a", files)
    with pytest.raises(UserError, match=r"3 of 11 images are bad.*a\.heic.*c\.tiff has floats as"):
        write_shards(source, tmp_path / "1")
    result = write_shards(source, tmp_path / "1", max_bad=0.5)
    assert [name for name, _ in result.bad_images] == ["a.heic", "b.gif", "c.tiff"]


def test_images_of_other_formats_are_stored_upright(tmp_path):
    upright = noise(0, 8, 16)
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    for name, options in (("TIFF", {}), ("AVIF", {"quality": 100, "subsampling": "4:4:4"})):
        files = {f"a.{name.lower()}": encoded(stored, name, exif=exif, **options)}
        result = write_shards(as_folder(tmp_path / name, files), tmp_path / f"{name}-shards")
        assert result.manifest.resolution == (8, 16)
        (data,) = labelled(result)
        assert np.abs(decode(data, None, 3).astype(int) - upright).mean() < 3


def test_images_that_come_out_nearly_black_are_counted(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (8, 8), dtype=np.uint16)
    files = {"a.png": encoded(values), "b.tif": encoded(values, "TIFF"), "c.png": png(0)}
    result = write_shards(as_folder(tmp_path / "a", files), tmp_path / "1", resolution=4)
    sentence = "16-bit images with values below 4,096 are nearly black; scale them first"
    assert result.notes == [f"{sentence}: 2"]


def test_folders_that_are_hidden_are_counted(tmp_path):
    files = {f"{folder}/0.png": png(0) for folder in ("a", ".cache", "__MACOSX", "a/.trash")}
    result = write_shards(as_folder(tmp_path / "a", files), tmp_path / "1")
    assert (len(result.manifest.samples), result.ignored) == (1, {"(hidden)": 3})


def test_frames_that_are_not_stored_are_counted(tmp_path):
    frames = [Image.fromarray(noise(i, 8)) for i in range(3)]
    files = {
        "a.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "b.tif": encoded(frames[1], "TIFF", save_all=True, append_images=frames[1:]),
    }
    result = write_shards(as_folder(tmp_path / "a", files), tmp_path / "1", resolution=8)
    assert result.notes == [
        "GIF files have several frames or pages; only the first is stored: 1",
        "TIFF files have several frames or pages; only the first is stored: 1",
    ]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    "make", [os.mkfifo, make_socket, lambda path: path.symlink_to("/dev/zero")],
    ids=["named pipe", "socket", "device"],
)  # fmt: skip
def test_what_is_not_a_file_is_counted_and_never_opened(
    tmp_path, monkeypatch, make: Callable[[Path], object]
):
    source = as_folder(tmp_path / "a", {"0.png": png(0)})
    monkeypatch.chdir(source)  # the path of a socket must be short
    make(Path("x.png"))
    code, stdout, _ = write(source, tmp_path / "1")
    assert code == 0
    assert "files that are not stored: 1 (pipe, socket or device)" in stdout
    code, _, stderr = write(f"{source}/x.png", tmp_path / "2")
    assert (code, stderr) == (
        2,
        f"error: {source}/x.png is not a folder, zip or tar, but a pipe or device\n",
    )


def test_a_broken_link_to_an_image_is_named_and_one_to_another_file_is_counted(tmp_path):
    source = as_folder(tmp_path / "a", {"0.png": png(0)})
    Path(source, "readme.md").symlink_to("nowhere")
    Path(source, "1.png").symlink_to(Path(source, "0.png"))
    code, stdout, _ = write(source, tmp_path / "1")
    assert code == 0
    assert "files that are not stored: 1 (broken link)" in stdout
    assert "samples      2" in stdout
    for target in ("nowhere", "2.png"):  # the second points to itself
        Path(source, "2.png").unlink(missing_ok=True)
        Path(source, "2.png").symlink_to(target)
        code, _, stderr = write(source, tmp_path / "2")
        assert code == 2
        assert stderr.startswith(f"error: cannot read {source}/2.png: ")
        assert stderr.endswith(" (a broken link)\n")


def test_links_to_folders_are_followed_unless_they_lead_to_images_twice(tmp_path):
    elsewhere, source = tmp_path / "elsewhere", tmp_path / "source"
    as_folder(elsewhere, {"ant/1.png": png(1), "bee/2.png": png(2)})
    source.mkdir()
    for name in ("ant", "bee"):
        (source / name).symlink_to(elsewhere / name)
    write_shards(str(source), tmp_path / "shards", classes="folder")
    assert Manifest.load(tmp_path / "shards").class_names == ("ant", "bee")
    for target in (source, tmp_path, elsewhere / "ant"):
        (elsewhere / "bee" / "link").symlink_to(target)
        with pytest.raises(UserError, match=r"link is a link to a folder .*: remove the link"):
            write_shards(str(source), tmp_path / "more")
        (elsewhere / "bee" / "link").unlink()


def test_names_that_are_not_utf_8_are_stored_and_shown(tmp_path):
    source = as_folder(tmp_path / "a", {"caf\udce9/0.png": png(0), "th\udce9/\udcff.png": png(1)})
    result = write_shards(source, tmp_path / "1", classes="folder")
    assert labelled(result) == {png(0): 0, png(1): 1}
    Path(source, "caf\udce9", "bad\udcff.png").write_bytes(b"?")
    code, stdout, _ = write(source, tmp_path / "2", "--classes", "folder", "--max-bad", "0.9")
    assert code == 0
    assert r"left out 1 bad images: caf\xe9/bad\xff.png cannot be decoded" in stdout
    assert "  class     0             1  caf\\xe9\n" in stdout


def test_a_data_set_within_the_source_is_not_part_of_it(tmp_path):
    """Its manifest.npy has the extension of an image."""
    source = as_folder(tmp_path / "a", {f"{i}.png": png(i) for i in range(3)})
    as_folder(tmp_path / "a" / "app", {"manifest.json": b"{}", "3.png": png(3)})
    output = Path(source, "out", "8")
    for ignored in ({}, {"(folder of a data set)": 1}):
        result = write_shards(source, output, resolution=8, image_format="npy")
        assert (len(result.manifest.samples), result.ignored) == (4, ignored | {"json": 1})
    assert len(write_shards(source, Path(source, "out", "4"), resolution=4).manifest.samples) == 4
    with pytest.raises(UserError, match="the shards need another folder than that of the images"):
        write_shards(source, source)


def test_images_beside_others_of_the_same_name_are_printed(tmp_path):
    """Masks, perhaps."""
    files = {f"{i}.{extension}": png(i) for i in range(3) for extension in ("jpg", "png")}
    source = as_folder(tmp_path / "a", files | {"3.png": png(3)})
    result = write_shards(source, tmp_path / "1")
    assert result.notes == [
        "images that differ only in their extension (jpg, png), all stored: 3; --image EXT takes "
        "one kind"
    ]
    assert write_shards(source, tmp_path / "2", image="jpg").notes == []


def test_only_images_of_the_chosen_extension_are_stored(tmp_path):
    files = {"0.left.png": png(0), "0.right.png": png(1), "0.npy": b"\x93NUMPY"}
    source = as_folder(tmp_path / "a", files)
    result = write_shards(source, tmp_path / "1", image="left.png")
    assert labelled(result) == {png(0): -1}
    assert result.ignored == {"npy": 1, "png": 1}
    with pytest.raises(UserError, match=r"no images in .* \(looked for: middle\.png\)"):
        write_shards(source, tmp_path / "2", image="middle.png")
