"""Read an RGB image or a label image, whatever the container (numpy and Pillow only).

PNG, JPEG, TIFF, BMP and WebP; no other decoder is ever tried on a file. The container does not
matter, the decoded pixels do: ``pixel_sha256`` is what manifests compare.
Shapes: H = rows, W = columns.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pathsegdiff import files
from pathsegdiff.errors import DataError, printable

#: Refuse larger images before decoding: half a gigapixel (23,170 px square) is 1.6 GB as RGB.
MAX_PIXELS = 1 << 29
#: In the order of preference where one stem exists in several containers: lossless first.
IMAGE_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
#: Pillow calls a phone's JPEG that carries a preview MPO: its first picture is the image.
_JPEG_FORMATS = ("JPEG", "MPO")
#: EXIF orientations that swap rows and columns.
_SWAPPING = (5, 6, 7, 8)

# Pillow's own limit (89 megapixels) is below a BCSS region at 0.25 um/px; ours replaces it.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)
# Caught below, as one line. Set once and for all, since filters are not per thread.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def read_image(path: Path) -> np.ndarray:
    """Read an image as RGB.

    Grey is repeated over the channels, 16-bit keeps its upper byte, a palette gives its colours,
    transparency is laid over white (the colour of empty glass), CMYK is converted. An EXIF
    rotation is applied, as viewers and annotation tools do.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: If the file is missing, unreadable or truncated, has several pages, above
            ``MAX_PIXELS`` pixels, or values whose range is unknown (floats, 32-bit).
    """
    with _opened(path) as image:
        upright = _upright(image, path)
        if upright.mode.startswith(("I", "F")):
            return np.repeat(_upper_byte(upright, path)[..., None], 3, axis=2)
        if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
            upright = _over_white(upright)
        return np.array(upright.convert("RGB"), dtype=np.uint8)


def read_label_image(path: Path) -> np.ndarray:
    """Read a mask as the integers that it holds.

    8- and 16-bit grey as they are, a palette image gives its indices, a 1-bit image 0 and 1. RGB
    is accepted where the three channels are equal, and transparency where there is none of it.

    Returns:
        (H, W) int32 raw codes, 0 or more.

    Raises:
        DataError: As ``read_image``, and if the pixels are colours, fractions or negative, or the
            file is a JPEG (its codes blur into their neighbours).
    """
    with _opened(path) as image:
        if image.format in _JPEG_FORMATS:
            raise DataError(
                f"{shown(path)}: a JPEG cannot hold a mask, since compression blurs its codes; "
                "save it as PNG"
            )
        upright = _upright(image, path)
        codes = np.asarray(upright)
        if upright.mode in ("LA", "RGBA"):
            if (codes[..., -1] != 255).any():
                raise DataError(
                    f"{shown(path)}: the mask is partly transparent; save it with one channel "
                    "that holds a code per pixel"
                )
            codes = codes[..., :-1]
        elif upright.mode not in ("1", "L", "P", "RGB") and not upright.mode.startswith("I"):
            raise DataError(
                f"{shown(path)}: a mask holds one integer per pixel, this one is of mode "
                f"{upright.mode}; save it as 8- or 16-bit grey"
            )
        if codes.ndim == 3:
            if (codes != codes[..., :1]).any():
                raise DataError(
                    f"{shown(path)}: the mask holds colours; save it with one channel that holds "
                    "a code per pixel"
                )
            codes = codes[..., 0]
        low, high = int(codes.min()), int(codes.max())  # _upright lets no empty image pass
        if low < 0:
            raise DataError(f"{shown(path)}: the mask holds {low}; codes are 0 or more")
        if high > np.iinfo(np.int32).max:
            raise DataError(f"{shown(path)}: the mask holds {high}; that is no class code")
        return codes.astype(np.int32)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright image, from its header alone.

    Raises:
        DataError: If the file is missing, is no image of the known containers, or too large.
    """
    with _opened(path) as image:
        width, height = image.size
        # Pillow turns a TIFF's size already when it opens the file.
        swapped = image.format != "TIFF" and _orientation(image) in _SWAPPING
        return (width, height) if swapped else (height, width)


def pixel_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of decoded pixels, row by row: the same for every container that holds them.

    Args:
        pixels: (H, W, 3) uint8 RGB, or (H, W) integer codes of 0 or more. Codes are hashed in the
            smallest of uint8, uint16 and int32 (little-endian) that holds them, so that the
            width of the file's samples does not matter.

    Returns:
        64 hex digits.
    """
    if pixels.dtype != np.uint8:
        top = int(pixels.max(initial=0))
        pixels = pixels.astype("u1" if top < 1 << 8 else "<u2" if top < 1 << 16 else "<i4")
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def is_jpeg(path: Path) -> bool:
    """Whether the file starts as a JPEG does, whatever it is called."""
    try:
        with path.open("rb") as file:
            return file.read(3) == b"\xff\xd8\xff"
    except OSError:
        return False


def file_sha256(path: Path) -> str:
    """SHA-256 (64 hex digits) of the file as it is.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return files.file_sha256(path)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}") from None


def shown(value: object) -> str:
    """A path or a value from a file as one printable line, for messages."""
    try:
        text = printable(str(value))
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    except RecursionError:
        return "something nested too deeply to be shown"
    return text if len(text) <= 500 else f"{text[:500]}..."


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image file, opened but not decoded; whatever Pillow raises becomes one line."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(_too_large(path, f"{height} x {width} px"))
            pages = getattr(image, "n_frames", 1)
            if pages > 1 and image.format != "MPO":
                raise DataError(
                    f"{shown(path)} has {pages} pages or frames; export the one to use as an "
                    "image of its own"
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{shown(path)}: there is no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large(path, "its header says so")) from None
    except UnidentifiedImageError:
        raise DataError(
            f"{shown(path)} is no readable png, jpg, tif, bmp or webp image; "
            "open and save it with an image viewer, or get it again"
        ) from None
    except MemoryError:
        raise DataError(f"{shown(path)}: not enough memory to decode it") from None
    except Exception as error:  # decoders meet hostile bytes with any kind of exception
        reason = shown(error).replace("\n", " ")[:150] or type(error).__name__
        raise DataError(
            f"{shown(path)} cannot be read ({reason}); the file is damaged or cut off, get it again"
        ) from None


def _too_large(path: Path, size: str) -> str:
    return (
        f"{shown(path)} is too large ({size}; at most {MAX_PIXELS:,} pixels); "
        "cut it into regions first"
    )


def _upright(image: Image.Image, path: Path) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise DataError(f"{shown(path)} is empty ({image.height} x {image.width} px)")
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) where there is none, or none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data does not spoil the pixels
        return 1
    return value if value in range(1, 9) else 1


def _upper_byte(image: Image.Image, path: Path) -> np.ndarray:
    """(H, W) uint8 of an image with one channel of more than 8 bits."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise DataError(
            f"{shown(path)}: the range of its pixels (mode {image.mode}) is not known; "
            "save it as 8-bit RGB"
        )
    return (values >> 8).astype(np.uint8)


def _over_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer)
