"""Every kind of image file becomes the same plain uint8 array, or an error that says why not."""

import io
import itertools
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ganscale.data.images import decoding
from ganscale.data.images.decoding import (
    DecodeError,
    decode,
    decode_into,
    image_extension,
    image_size,
)
from ganscale.shards.shard_index import pixel_size
from tests.helpers.images import encoded


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def colours(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random image, which JPEG can represent well."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


@pytest.mark.parametrize(
    ("file_format", "channels"),
    [("PNG", 1), ("PNG", 3), ("WEBP", 3), ("NPY", 1), ("NPY", 3)],
)
def test_lossless_images_of_the_requested_size_keep_their_exact_pixels(file_format, channels):
    image = colours(32, 32) if channels == 3 else colours(32, 32).convert("L")
    pixels = np.asarray(image).reshape(32, 32, channels)
    is_array = file_format == "NPY"
    data = npy(pixels) if is_array else encoded(image, file_format, lossless=True)
    result = decode(data, 32, channels)
    assert np.array_equal(result, pixels)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous


def test_arrays_in_fortran_order_and_without_a_channel_axis_are_read_right():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(decode(npy(np.asfortranarray(grey)), None, 1)[:, :, 0], grey)
    colour = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(decode(npy(np.asfortranarray(colour)), None, 3), colour)


def test_a_grey_image_fills_three_channels_and_a_colour_one_gives_its_luma():
    grey = encoded(Image.new("L", (8, 8), 77), "PNG")
    assert (decode(grey, 8, 3) == 77).all()
    red = encoded(Image.new("RGB", (8, 8), (255, 0, 0)), "PNG")
    assert (decode(red, 8, 1) == round(0.299 * 255)).all()


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA", "RGB"])
def test_png_modes_agree_with_the_colours_that_they_store(mode):
    original = Image.new("RGB", (8, 8), (255, 255, 255))
    original.paste((0, 0, 0), (0, 0, 4, 8))
    result = decode(encoded(original.convert(mode), "PNG"), 8, 3)
    assert np.array_equal(result, np.asarray(original))


def test_transparency_is_blended_with_white():
    half_red = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    expected = [255, round(127 / 255 * 255), 127]
    assert np.abs(decode(encoded(half_red, "PNG"), 8, 3).astype(int) - expected).max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    assert (decode(encoded(palette, "PNG", transparency=0), 8, 3) == 255).all()
    assert (decode(npy(np.zeros((8, 8, 4), np.uint8)), 8, 3) == 255).all()


def test_sixteen_bit_grey_keeps_its_high_byte():
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    result = decode(encoded(values, "PNG"), None, 1)
    assert result[:, :, 0].tolist() == [[0, 0, 1], [128, 254, 255]]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "I;16"])
@pytest.mark.parametrize("resolution", [None, 8, 24])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_has_the_same_pixels_with_every_decoder(monkeypatch, mode, resolution, channels):
    values = np.random.default_rng(0).integers(0, 256, (24, 24, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values.view(np.uint16)[:, :, 0].copy())
    else:
        image = Image.fromarray(values).convert(mode)
    data = encoded(image, "PNG")
    result = decode(data, resolution, channels)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "png_decode", None)
        assert np.array_equal(decode(data, resolution, channels), result)
        patch.setattr(decoding, "_decode_plain_png", lambda data, out: None)
        assert np.array_equal(decode(data, resolution, channels), result)


def test_a_png_in_several_chunks_with_text_and_a_colour_profile_is_read_right():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    packed = zlib.compress(rows)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 7, 9, 8, 2, 0, 0, 0)),
        (b"gAMA", struct.pack(">I", 45455)),
        (b"tEXt", b"Comment\0none"),
        (b"IDAT", packed[:50]),
        (b"IDAT", b""),
        (b"IDAT", packed[50:]),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in chunks)
    assert np.array_equal(decode(data, None, 3), pixels)
    assert np.array_equal(decode(data + b"what follows the image", None, 3), pixels)


def test_a_transparent_colour_and_a_palette_in_a_png_are_applied():
    image = Image.new("RGB", (8, 8), (9, 9, 9))
    data = encoded(image, "PNG", transparency=(9, 9, 9))
    assert (decode(data, 8, 3) == 255).all()


def test_any_flipped_bit_in_a_png_is_an_error():
    """Without the checksums most would pass, as noise."""
    data = encoded(colours(32, 32), "PNG")
    for position in np.random.default_rng(0).integers(0, len(data), 100).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 16
        with pytest.raises(DecodeError):
            decode(bytes(damaged), 32, 3)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "NPY"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (128, 128), (100, 37)])
def test_decoding_into_a_batch_gives_the_same_pixels_and_touches_no_other_row(
    file_format, channels, size
):
    image = colours(*size)
    data = npy(np.asarray(image)) if file_format == "NPY" else encoded(image, file_format)
    for batch in (
        np.full((3, 32, 32, channels), 7, np.uint8),
        np.full((3, channels, 32, 32), 7, np.uint8).transpose(0, 2, 3, 1),
    ):
        decode_into(data, batch[1])
        assert np.array_equal(batch[1], decode(data, 32, channels))
        assert (batch[[0, 2]] == 7).all()


def test_decoding_a_damaged_file_into_a_batch_is_an_error():
    data = encoded(colours(32, 32), "JPEG")
    with pytest.raises(DecodeError):
        decode_into(data[: len(data) // 2], np.empty((32, 32, 3), np.uint8))


def test_a_ycck_jpeg_has_its_colours():
    """Inks stored as luma, chroma and black, which Pillow cannot write: so by hand."""
    original = colours(64, 64)
    *inks, black = original.convert("CMYK").split()
    luma_chroma = Image.merge("RGB", inks).convert("YCbCr").split()
    stored = Image.merge("CMYK", [*luma_chroma, black.point(lambda value: 255 - value)])
    # Pillow stores the complements of inks.
    complements = stored.point(lambda value: 255 - value)
    data = bytearray(encoded(complements, "JPEG", quality=95))
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0  # the transform: none
    data[adobe + 11] = 2  # YCCK
    assert difference(decode(bytes(data), 64, 3), np.asarray(original)) < 6


def test_a_cmyk_jpeg_has_its_colours():
    original = colours(64, 64)
    data = encoded(original.convert("CMYK"), "JPEG", quality=95)
    assert difference(decode(data, 64, 3), np.asarray(original)) < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resolution", [None, 16, [8, 12], [12, 8]])
def test_every_exif_orientation_is_undone(orientation, resolution):
    upright = colours(40, 24)
    # How each is turned or mirrored to be viewed (Exif 2.32, 4.6.4, tag 0x0112), undone.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0)
    plain = decode(encoded(upright, "PNG"), resolution, 3)
    assert difference(decode(data, resolution, 3), plain) < 4


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_to_pixels_and_size(file_format):
    upright = colours(40, 24)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    options = {"PNG": {}, "WEBP": {"lossless": True}}.get(
        file_format, {"quality": 95, "subsampling": 0}
    )
    data = encoded(turned, file_format, exif=exif, **options)
    assert image_size(data) == (40, 24)
    assert difference(decode(data, None, 3), np.asarray(upright)) < 4


def test_exif_in_an_old_text_chunk_of_a_png_turns_pixels_and_size():
    """As ImageMagick writes it; with the size that indexing records."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    text = PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8d}\n{raw.hex()}\n")
    data = encoded(colours(10, 20), "PNG", pnginfo=text)
    assert decode(data, None, 3).shape == (20, 10, 3)
    assert image_size(data) == (20, 10)
    assert pixel_size(data) == (20, 10)


@pytest.mark.parametrize(
    "function", [lambda data: decode(data, 4, 3), image_size, decoding.is_gray]
)
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_is_no_damage(monkeypatch, function, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(decoding, "_open", fail)
    with pytest.raises(type(error)):
        function(encoded(colours(4, 4), "WEBP"))


def test_the_centre_of_a_wide_image_is_kept():
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    for size in (32, 16):
        result = decode(encoded(wide, "PNG"), size, 3)
        assert result.shape == (size, size, 3)
        # A Lanczos filter reaches three pixels beyond the crop.
        assert (result[:, 3:-3] == [0, 0, 255]).all()


def part_by_hand(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred part with this ratio of its sides, resized by Pillow."""
    rows, columns = pixels.shape[:2]
    if rows / height > columns / width:
        kept = int(columns * height / width + 0.5)
        pixels = pixels[(rows - kept) // 2 :][:kept]
    else:
        kept = int(rows * width / height + 0.5)
        pixels = pixels[:, (columns - kept) // 2 :][:, :kept]
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized).reshape(height, width, -1)


@pytest.mark.parametrize("resolution", [[16, 32], [32, 16], [48, 20], [60, 64], [7, 100]])
@pytest.mark.parametrize("size", [(64, 64), (120, 50), (33, 97), (16, 32), (20, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_largest_part_of_the_same_ratio_is_resized(resolution, size, channels):
    pixels = np.asarray(colours(*size) if channels == 3 else colours(*size).convert("L"))
    pixels = pixels.reshape(*size, channels)
    expected = part_by_hand(pixels, *resolution).astype(int)
    batch = np.zeros((1, *resolution, channels), np.uint8)
    picture = Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)
    for data in (npy(pixels), encoded(picture, "PNG")):
        decode_into(data, batch[0])
        assert np.array_equal(batch[0], decode(data, resolution, channels))
        assert np.abs(batch[0] - expected).max() <= 2


def test_an_image_of_the_size_that_is_asked_for_keeps_its_pixels_if_it_is_not_square():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    assert np.array_equal(decode(npy(pixels), [16, 24], 3), pixels)
    sixteen_bits = pixels[..., 0].astype(np.uint16) << 8
    data = encoded(Image.fromarray(sixteen_bits), "PNG")
    assert np.array_equal(decode(data, [16, 24], 1)[..., 0], pixels[..., 0])


def test_a_jpeg_is_never_decoded_smaller_than_what_is_kept_of_it(monkeypatch):
    """A wide image for a high target: its height decides, not its width; stored upright or not."""
    whole = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None] % 2 * 255, (1, 640)))
    lying = Image.Exif()
    lying[0x0112] = 6
    turned = whole.transpose(Image.Transpose.ROTATE_90)
    options = {"quality": 98, "subsampling": 0}
    files = encoded(whole, "JPEG", **options), encoded(turned, "JPEG", exif=lying, **options)
    for resolution in ([64, 32], [64, 8]):
        expected = part_by_hand(np.asarray(whole)[..., None], *resolution)
        for data, decoder in itertools.product(files, (decoding.simplejpeg, None)):
            with monkeypatch.context() as patch:
                patch.setattr(decoding, "simplejpeg", decoder)
                assert difference(decode(data, resolution, 1), expected) < 3


@pytest.mark.parametrize(("size", "resolution"), [(300, 64), (75, 64), (28, 32), (64, 63)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_pillows_lanczos_filter_to_one_level(size, resolution, channels):
    values = np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)
    small = Image.fromarray(values.squeeze(2) if channels == 1 else values)
    small = small.resize((resolution, resolution), Image.Resampling.LANCZOS)
    expected = np.asarray(small).reshape(resolution, resolution, channels).astype(int)
    assert np.abs(decode(npy(values), resolution, channels) - expected).max() <= 1


def test_downscaling_is_antialiased():
    """Stripes of one pixel become even grey; a filter without antialiasing gives black or white."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    result = decode(npy(stripes), 16, 1)[2:-2, 2:-2].astype(int)
    assert np.abs(result - 127.5).max() < 3


@pytest.mark.parametrize("resolution", [None, 16, 50, 64, 100, [16, 32], [100, 50]])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_jpeg_gives_the_same_pixels_with_and_without_simplejpeg(
    monkeypatch, resolution, channels, options
):
    pytest.importorskip("simplejpeg")
    for image in (colours(130, 201), colours(128, 128).convert("L")):
        data = encoded(image, "JPEG", **options)
        fast = decode(data, resolution, channels)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "simplejpeg", None)
            assert np.array_equal(decode(data, resolution, channels), fast)


@pytest.mark.parametrize("resolution", [[64, 64], [64, 32], [16, 64]])
def test_a_scaled_jpeg_is_close_to_one_that_was_decoded_whole(resolution):
    data = encoded(colours(256, 256), "JPEG", quality=95)
    whole = part_by_hand(decode(data, None, 3), *resolution)
    assert difference(decode(data, resolution, 3), whole) < 1


def test_extensions_follow_the_contents():
    image = colours(8, 8)
    assert image_extension(encoded(image, "JPEG")) == "jpg"
    assert image_extension(encoded(image, "PNG")) == "png"
    assert image_extension(encoded(image, "WEBP")) == "webp"
    assert image_extension(npy(np.asarray(image))) == "npy"


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header promises any number of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def large_jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded(colours(16, 16), "JPEG"))
    start = data.index(b"\xff\xc0") + 5  # the frame header's height and width
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [bomb(30_000, 30_000), bomb(8001, 8000), large_jpeg(10_000, 10_000)],
    ids=["png-900MP", "png-64MP", "jpeg-100MP"],
)
def test_decompression_bombs_are_refused_by_their_header(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(DecodeError, match=r"pixels|bomb"):
            decode(data, 32, 3)


def test_an_array_header_cannot_ask_for_memory():
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (1_000_000, 1_000_000)}
    np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(DecodeError, match="more than the limit"):
        decode(stream.getvalue() + b"123", 32, 1)


def test_pickles_in_arrays_are_refused_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("trap").touch, ())

    with pytest.raises(DecodeError, match="array of object"):
        decode(npy(np.array([Trap()], object)), 32, 3)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "NPY"])
def test_a_file_cut_anywhere_is_an_error(file_format):
    image = colours(64, 64)
    data = npy(np.asarray(image)) if file_format == "NPY" else encoded(image, file_format)
    for kept in (0, 3, 9, 20, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(DecodeError):
            decode(data[:kept], 32, 3)


def test_text_floats_and_odd_shapes_are_errors():
    for data in (
        b"<html>404</html>",
        npy(np.zeros((8, 8), np.float32)),
        npy(np.zeros((8, 8, 2), np.uint8)),
        npy(np.zeros((0, 8), np.uint8)),
    ):
        with pytest.raises(DecodeError):
            decode(data, 8, 3)
