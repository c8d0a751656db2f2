"""The one way in which a picture file becomes RGB pixels: for training, caching, scoring and bounds alike.

    16 bits              the upper eight of each
    EXIF orientation     applied: pixels and sizes are upright
    transparency         composited on white; a wholly opaque picture stays what it is
    grey, palette, CMYK  converted
    32 bits, float       refused: the file does not say what is black and what is white

Whatever a decoder says about a file becomes one ValueError that names it. Pictures of more than 179 million pixels are
refused before they are decoded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from util.read import read_bytes, require_regular_file, short_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_SWAPS_SIDES = (5, 6, 7, 8)
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # whose mode I means 16 bits; elsewhere it means 32

# PIL warns at half the size at which it refuses. The refusal is the limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_image(path: str | Path) -> Image.Image:
    """The whole image as upright RGB. Raises FileNotFoundError, or ValueError if it cannot be decoded; both name it."""
    return decode_image(read_image_bytes(path), path)


def read_image_bytes(path: str | Path) -> bytes:
    """The file's content. Raises FileNotFoundError or ValueError, naming it."""
    _require_file(path)
    return read_bytes(path, "image")


def decode_image(content: bytes, path: str | Path) -> Image.Image:
    """`load_image` of what was read from `path`."""
    with _decoding(path), Image.open(BytesIO(content)) as image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        pixels = _to_rgb(image)
        return pixels if turn is None else pixels.transpose(turn)


def picture_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of what `load_image` gives, from the header alone. Raises as it does."""
    _require_file(path)
    with _decoding(path), open(path, "rb") as file:
        return _read_header(file).upright_size


def content_size(content: bytes, path: str | Path) -> tuple[int, int]:
    """`picture_size` of what was read from `path`."""
    with _decoding(path):
        return _read_header(BytesIO(content)).upright_size


def png_text(content: bytes, path: str | Path) -> dict[str, str]:
    """The texts in a PNG's metadata; {} for pictures of other formats. Raises ValueError, naming `path`, for what is no
    picture."""
    with _decoding(path), Image.open(BytesIO(content)) as image:
        if not isinstance(image, PngImagePlugin.PngImageFile):
            return {}
        return {str(key): str(value) for key, value in image.text.items()}


def check_picture(path: str | Path, size: tuple[int, int] | None, named_in: str) -> None:
    """Raises FileNotFoundError or ValueError, naming the file, unless it can be an image of this (width, height), which
    `named_in` says it has (None: of any size).

    Reads its header and its end. Only a file that does not end as its format does is decoded, to see if it is whole.
    """
    _require_file(path)
    with _decoding(path), open(path, "rb") as file:
        header = _read_header(file)
    if size is not None:
        _require_size(path, header, size, named_in)
    if not header.is_whole:
        load_image(path)


def require_size(path: str | Path, image: Image.Image, size: tuple[int, int], named_in: str) -> None:
    """Raises ValueError, naming the file and both sizes, unless the image that `load_image` gave has this one."""
    if image.size != size:
        with open(path, "rb") as file:
            _require_size(path, _read_header(file), size, named_in)


class _Header:
    """What can be known of a picture before it is decoded."""

    def __init__(self, image: Image.Image, is_whole: bool) -> None:
        self.stored_size = image.size
        self.orientation = _orientation(image)
        self.is_whole = is_whole

    @property
    def upright_size(self) -> tuple[int, int]:
        width, height = self.stored_size
        return (height, width) if self.orientation in _SWAPS_SIDES else (width, height)


def _require_file(path: str | Path) -> None:
    try:
        require_regular_file(path, "image")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image not found: {str(error).removeprefix('image ')}") from None


def _require_size(path: str | Path, header: _Header, size: tuple[int, int], named_in: str) -> None:
    found, stored = header.upright_size, header.stored_size
    if found == size:
        return
    turned = "" if stored == found else f" upright (stored as {_words(stored)}, EXIF orientation {header.orientation})"
    advice = ": turn the stored pixels upright, or remove the orientation" if stored == size else ""
    raise ValueError(f"image {short_path(path)} is {_words(found)}{turned}, but {named_in} says {_words(size)}{advice}")


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Decoders raise many things about a broken file; each becomes a ValueError that names it."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read image {short_path(path)}: it is empty or in no known format") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read image {short_path(path)}: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """image: decoded, of any mode."""
    _require_known_range(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        grey = (levels >> 8).astype(np.uint8)
        if isinstance(image.info.get("transparency"), int):
            grey[levels == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _require_known_range(image: Image.Image) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BIT_FORMATS):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{kind} pixels do not say what is black and what is white: save it with 8 or 16 bits")


def _orientation(image: Image.Image) -> int:
    """1 (upright) to 8. TIFF is turned by its decoder."""
    return 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)


def _read_header(file: BinaryIO) -> _Header:
    with Image.open(file) as image:
        _require_known_range(image)
        if image.format == "PNG":
            late_exif, is_whole = _walk_png(file)
            image.info.setdefault("exif", late_exif)  # else asking for it would decode the picture
        else:
            is_whole = image.format in ("JPEG", "MPO") and _last_bytes(file, 2) == b"\xff\xd9"
        return _Header(image, is_whole)


def _walk_png(file: BinaryIO) -> tuple[bytes, bool]:
    """-> EXIF data (b"": none) wherever it stands, and whether the chunks go on to the end of the picture."""
    size, exif = file.seek(0, 2), b""
    position = 8
    while position + 12 <= size:
        file.seek(position)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            return exif, True
        if kind == b"eXIf":
            exif = file.read(length)
        position += 12 + length
    return exif, False


def _last_bytes(file: BinaryIO, count: int) -> bytes:
    file.seek(max(0, file.seek(0, 2) - count))
    return file.read(count)
