"""Images and masks of every container and mode: the pixels that come out, and what is refused."""

import hashlib
import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pathsegdiff.data import image as image_module
from pathsegdiff.data.image import image_size, pixel_sha256, read_image, read_label_image, shown
from pathsegdiff.errors import DataError


@pytest.fixture
def pixels() -> np.ndarray:
    """(5, 7, 3) uint8 RGB."""
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def codes_upto(top: int, dtype: str = "uint8") -> np.ndarray:
    """(5, 7) codes from 0 to ``top``."""
    return np.linspace(0, top, 35).astype(dtype).reshape(5, 7)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
def test_a_lossless_container_gives_back_the_pixels(tmp_path, pixels, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(pixels).save(path, lossless=True)
    assert read_image(path).tolist() == pixels.tolist()
    assert read_image(path).dtype == np.uint8
    assert image_size(path) == (5, 7)


def test_a_jpeg_gives_nearly_the_pixels(tmp_path):
    flat = np.full((16, 24, 3), (200, 120, 160), np.uint8)
    Image.fromarray(flat).save(tmp_path / "image.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "image.jpg").astype(int) - flat).max() <= 3


def test_the_content_decides_not_the_suffix(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "image.jpg", format="PNG")
    assert read_image(tmp_path / "image.jpg").tolist() == pixels.tolist()


def test_grey_is_repeated(tmp_path):
    Image.fromarray(codes_upto(255)).save(tmp_path / "grey.png")
    read = read_image(tmp_path / "grey.png")
    assert all((read[..., channel] == codes_upto(255)).all() for channel in range(3))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_keep_the_upper_byte(tmp_path, suffix):
    grey = codes_upto(0xFFFF, "uint16")
    Image.fromarray(grey).save(tmp_path / f"grey{suffix}")
    read = read_image(tmp_path / f"grey{suffix}")
    assert read.shape == (5, 7, 3)
    assert read[..., 1].tolist() == (grey >> 8).tolist()


def test_transparency_lies_over_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png")[0].tolist() == [
        [10, 20, 30],
        [255, 255, 255],
        [127, 127, 127],
    ]


def test_grey_with_transparency_lies_over_white_too(tmp_path):
    Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8)).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0].tolist() == [[9, 9, 9], [255, 255, 255]]


def test_a_palette_gives_its_colours_and_its_transparent_index_white(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putdata([0, 1, 2])
    palette.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    assert read_image(tmp_path / "p.png")[0].tolist() == [[200, 0, 0], [0, 100, 0], [0, 0, 50]]
    assert read_image(tmp_path / "clear.png")[0, 1].tolist() == [255, 255, 255]


def test_one_bit_is_black_and_white_as_an_image_and_0_and_1_as_a_mask(tmp_path):
    bits = np.array([[True, False, True]])
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png")[0, :, 0].tolist() == [255, 0, 255]
    assert read_label_image(tmp_path / "bits.png").tolist() == [[1, 0, 1]]


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red, green, blue = read_image(tmp_path / "cmyk.jpg")[8, 8].tolist()
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_an_exif_rotation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :8] = 255  # the left edge as stored is the top edge as seen
    Image.fromarray(stored).save(tmp_path / f"image{suffix}", exif=exif, lossless=True)
    read = read_image(tmp_path / f"image{suffix}")
    assert read.shape == (32, 16, 3)
    assert image_size(tmp_path / f"image{suffix}") == (32, 16)
    assert read[:7].min() > 200
    assert read[9:].max() < 50


@pytest.mark.parametrize("kwargs", [{"format": "TIFF"}, {"format": "PNG"}, {"format": "WEBP"}])
def test_several_pages_are_refused(tmp_path, kwargs):
    first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")
    first.save(tmp_path / "pages", save_all=True, append_images=[second], **kwargs)
    with pytest.raises(DataError, match=r"pages has 2 pages or frames; export the one to use"):
        read_image(tmp_path / "pages")


def test_floats_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"range of its pixels \(mode F\) is not known"):
        read_image(tmp_path / "float.tif")
    with pytest.raises(DataError, match="one integer per pixel, this one is of mode F"):
        read_label_image(tmp_path / "float.tif")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp", ".jpg"])
def test_a_file_cut_off_is_one_line(tmp_path, suffix):
    whole = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(whole).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut\..*(damaged or cut off|no readable)") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_image_is_one_line(tmp_path):
    (tmp_path / "text.png").write_text("<html>sign in</html>")
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "empty.png"):
        with pytest.raises(DataError, match=f"{name} is no readable png, jpg, tif, bmp or webp"):
            read_image(tmp_path / name)


def test_a_missing_file_and_a_folder_are_said(tmp_path):
    with pytest.raises(DataError, match=r"none\.png: there is no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_image(tmp_path)


def test_other_decoders_are_never_tried(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png", format="GIF")
    with pytest.raises(DataError, match="is no readable"):
        read_image(tmp_path / "image.png")


def test_an_absurd_size_is_refused_from_the_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 50_000))
    for read in (read_image, read_label_image, image_size):
        with pytest.raises(DataError, match=r"bomb\.png is too large .*cut it into regions"):
            read(tmp_path / "bomb.png")


def test_a_size_just_above_the_limit_is_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("L", (10, 11)).save(tmp_path / "image.png")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 109)
    with pytest.raises(DataError, match=r"too large \(11 x 10 px; at most 109 pixels\)"):
        read_image(tmp_path / "image.png")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 110)
    assert read_image(tmp_path / "image.png").shape == (11, 10, 3)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "WEBP"]))
def test_damaged_bytes_give_pixels_or_one_line(tmp_path, data, format):
    buffer = io.BytesIO()
    pattern = np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)
    Image.fromarray(pattern).save(buffer, format=format)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "hostile").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        for read in (read_image, read_label_image):
            try:
                assert read(tmp_path / "hostile").shape[0] > 0
            except DataError as error:
                assert str(error).isprintable()


@pytest.mark.parametrize(("top", "dtype"), [(255, "uint8"), (60_000, "uint16")])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_masks_are_read_as_they_are(tmp_path, top, dtype, suffix):
    Image.fromarray(codes_upto(top, dtype)).save(tmp_path / f"mask{suffix}")
    read = read_label_image(tmp_path / f"mask{suffix}")
    assert read.dtype == np.int32
    assert read.tolist() == codes_upto(top, dtype).tolist()


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_a_palette_mask_gives_its_indices(tmp_path, suffix):
    mask = Image.new("P", (4, 1))
    mask.putdata([0, 7, 2, 255])
    mask.putpalette(list(range(255, -1, -1)) * 3)
    mask.save(tmp_path / f"mask{suffix}")
    assert read_label_image(tmp_path / f"mask{suffix}").tolist() == [[0, 7, 2, 255]]


def test_rgb_masks_with_equal_channels_are_read_and_colours_refused(tmp_path):
    grey = np.repeat(codes_upto(9)[..., None], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert read_label_image(tmp_path / "grey.png").tolist() == codes_upto(9).tolist()
    grey[0, 0] = 255, 0, 0
    Image.fromarray(grey).save(tmp_path / "red.png")
    with pytest.raises(DataError, match=r"red\.png: the mask holds colours; save it with one"):
        read_label_image(tmp_path / "red.png")


def test_a_mask_may_have_an_opaque_alpha_channel_only(tmp_path):
    rgba = np.dstack([codes_upto(9)] * 3 + [np.full((5, 7), 255, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    assert read_label_image(tmp_path / "opaque.png").tolist() == codes_upto(9).tolist()
    rgba[2, 2, 3] = 7
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    with pytest.raises(DataError, match=r"clear\.png: the mask is partly transparent"):
        read_label_image(tmp_path / "clear.png")


def test_a_jpeg_mask_is_refused(tmp_path):
    Image.fromarray(codes_upto(1)).save(tmp_path / "mask.png", format="JPEG")
    with pytest.raises(DataError, match="a JPEG cannot hold a mask.*save it as PNG"):
        read_label_image(tmp_path / "mask.png")


def test_negative_codes_are_refused(tmp_path):
    Image.fromarray(np.array([[1, -3]], np.int32)).save(tmp_path / "mask.tif")
    with pytest.raises(DataError, match=r"mask\.tif: the mask holds -3; codes are 0 or more"):
        read_label_image(tmp_path / "mask.tif")


def test_pixels_hash_as_their_bytes_row_by_row(pixels):
    assert pixel_sha256(pixels) == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert pixel_sha256(pixels[:, ::-1]) != pixel_sha256(pixels)


def test_the_width_of_a_masks_samples_does_not_matter():
    codes = codes_upto(200)
    expected = hashlib.sha256(codes.tobytes()).hexdigest()
    assert {pixel_sha256(codes.astype(kind)) for kind in ("u1", "u2", ">u2", "i4")} == {expected}
    wide = codes_upto(1000, "int32")
    assert pixel_sha256(wide) == hashlib.sha256(wide.astype("<u2").tobytes()).hexdigest()


def test_the_same_pixels_hash_the_same_from_every_container(tmp_path):
    drawing = Image.new("L", (30, 20))
    ImageDraw.Draw(drawing).ellipse((5, 5, 20, 15), fill=3)
    hashes = set()
    for suffix in (".png", ".bmp", ".tif", ".webp"):
        drawing.save(tmp_path / f"m{suffix}", lossless=True)
        hashes.add(pixel_sha256(read_label_image(tmp_path / f"m{suffix}")))
    assert len(hashes) == 1


def test_control_characters_are_shown_not_sent():
    assert shown("a\x1b[31m\nb") == r"a\x1b[31m\nb"
    assert shown("x" * 600).endswith("...")
    assert shown("nicht ASCII: ä") == "nicht ASCII: ä"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = zlib.compress(b"\0")
    out = b"\x89PNG\r\n\x1a\n"
    for name, chunk in ((b"IHDR", header), (b"IDAT", content), (b"IEND", b"")):
        out += struct.pack(">I", len(chunk)) + name + chunk
        out += struct.pack(">I", zlib.crc32(name + chunk))
    return out


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, chunk in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        out += struct.pack(">I", len(chunk)) + name + chunk
        out += struct.pack(">I", zlib.crc32(name + chunk))
    return out


def _packed(size: int) -> bytes:
    """Zlib's stream of so many zeros, one block again and again; its checksum is wrong."""
    packer = zlib.compressobj(9)
    start = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * (size >> 20) + packer.flush()


def _tiff(packed: bytes, rows: int) -> bytes:
    """8 px wide, 8 bits, one strip that is deflated."""
    tags = [(256, 8), (257, rows), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1)]
    tags += [(278, rows), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed
    return start + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_what_unpacks_to_half_a_gigabyte_takes_no_memory(tmp_path):
    bomb, pixels = _packed(1 << 29), zlib.compress(bytes(72))
    bombs = {
        "pixels.png": _png((b"IDAT", bomb)),
        "text.png": _png((b"zTXt", b"k\0\0" + bomb), (b"IDAT", pixels)),
        "unicode.png": _png((b"iTXt", b"k\0\1\0\0\0" + bomb), (b"IDAT", pixels)),
        "profile.png": _png((b"iCCP", b"k\0\0" + bomb), (b"IDAT", pixels)),
        "strip.tif": _tiff(bomb, 8),
        "claims.tif": _tiff(pixels, (1 << 31) - 1),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    script = """
import resource, sys, warnings
from pathlib import Path
from pathsegdiff.data.image import read_image, read_label_image
from pathsegdiff.errors import DataError
warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sorted(Path(sys.argv[1]).iterdir()):
    for read in (read_image, read_label_image):
        try:
            assert read(file).shape[:2] == (8, 8)
        except DataError as error:
            assert str(error).isprintable()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown // (1024 if sys.platform != "darwin" else 1024 * 1024))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150  # MiB
