"""The door of pictures: one picture in any encoding gives the same pixels; what is no picture is named in one line."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from util.images import load_image, picture_size, save_png
from util.picture_files import check_picture, content_size, png_text

HEIGHT, WIDTH = 6, 10
COLOURS = (np.indices((HEIGHT, WIDTH)).sum(0) % 8 * 36).astype(np.uint8)  # few: they fit a palette
GREY = np.repeat(COLOURS[..., None], 3, axis=2)
RGB = np.stack([COLOURS, COLOURS[::-1], 255 - COLOURS], axis=2)
OPAQUE = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
Turn = Image.Transpose
STORED_AS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_90,
             7: Turn.TRANSVERSE, 8: Turn.ROTATE_270}  # fmt: skip


def sixteen_bit(path: Path, picture: np.ndarray) -> None:
    """By OpenCV, which takes BGR or BGRA."""
    assert cv2.imwrite(str(path), picture[..., [2, 1, 0, 3][: picture.shape[2]]].astype(np.uint16) * 257)


def keyed(path: Path) -> None:
    """One colour of a palette is transparent, but none of the picture."""
    image = Image.fromarray(RGB).quantize(64, dither=Image.Dither.NONE)
    image.save(path, transparency=63)


def turned(orientation: int, picture: np.ndarray, **options: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture).transpose(STORED_AS[orientation]).save(path, exif=exif, **options)

    return write


def late_exif(path: Path) -> None:
    """An eXIf chunk behind the pixels, which the format allows."""
    Image.fromarray(RGB).transpose(Image.Transpose.ROTATE_90).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes()[6:] if exif.tobytes().startswith(b"Exif") else exif.tobytes()
    chunk = b"eXIf" + data
    content = path.read_bytes()
    assert content.endswith(b"IEND\xaeB`\x82")
    extra = len(data).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(content[:-12] + extra + content[-12:])


EXACT: dict[str, tuple[np.ndarray, Callable[[Path], object]]] = {
    "rgb.png": (RGB, lambda path: Image.fromarray(RGB).save(path)),
    "rgb.bmp": (RGB, lambda path: Image.fromarray(RGB).save(path)),
    "rgb.tiff": (RGB, lambda path: Image.fromarray(RGB).save(path)),
    "rgb.webp": (RGB, lambda path: Image.fromarray(RGB).save(path, lossless=True)),
    "cmyk.tiff": (RGB, lambda path: Image.fromarray(RGB).convert("CMYK").save(path)),
    "palette.png": (RGB, lambda path: Image.fromarray(RGB).quantize(64, dither=Image.Dither.NONE).save(path)),
    "palette.gif": (RGB, lambda path: Image.fromarray(RGB).quantize(64, dither=Image.Dither.NONE).save(path)),
    "palette_key.png": (RGB, keyed),
    "rgba.png": (RGB, lambda path: Image.fromarray(np.dstack([RGB, OPAQUE])).save(path)),
    "rgb16.png": (RGB, lambda path: sixteen_bit(path, RGB)),
    "rgba16.png": (RGB, lambda path: sixteen_bit(path, np.dstack([RGB, OPAQUE]))),
    "grey.png": (GREY, lambda path: Image.fromarray(COLOURS).save(path)),
    "grey_alpha.png": (GREY, lambda path: Image.fromarray(np.dstack([COLOURS, OPAQUE])).save(path)),
    "grey16.png": (GREY, lambda path: Image.fromarray(COLOURS.astype(np.uint16) * 257).save(path)),
    "grey16_shifted.png": (GREY, lambda path: Image.fromarray(COLOURS.astype(np.uint16) << 8).save(path)),
    "grey16.tiff": (GREY, lambda path: Image.fromarray(COLOURS.astype(np.uint16) * 257).save(path)),
    "grey16.pgm": (GREY, lambda path: Image.fromarray(COLOURS.astype(np.uint16) * 257).save(path, format="PPM")),
    "late_exif.png": (RGB, late_exif),
    **{f"turned{k}.png": (RGB, turned(k, RGB)) for k in STORED_AS},
    **{f"turned{k}.tiff": (RGB, turned(k, RGB)) for k in STORED_AS},
}  # fmt: skip
SMOOTH = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH))[..., None].repeat(3, 2).astype(np.uint8) * 12
LOSSY: dict[str, Callable[[Path], object]] = {
    "rgb.jpg": lambda path: Image.fromarray(SMOOTH).save(path, quality=100),
    "grey.jpg": lambda path: Image.fromarray(SMOOTH[..., 0]).save(path, quality=100),
    "cmyk.jpg": lambda path: Image.fromarray(SMOOTH).convert("CMYK").save(path, quality=100),
    "progressive.jpg": lambda path: Image.fromarray(SMOOTH).save(path, quality=100, progressive=True),
    **{f"turned{k}.jpg": turned(k, SMOOTH, quality=100, subsampling=0) for k in STORED_AS},
}


@pytest.mark.parametrize("name", EXACT)
def test_every_encoding_of_a_picture_gives_its_pixels(tmp_path, name):
    picture, write = EXACT[name]
    path = tmp_path / name
    write(path)
    np.testing.assert_array_equal(np.asarray(load_image(path)), picture)
    assert picture_size(path) == (WIDTH, HEIGHT)
    check_picture(path, (WIDTH, HEIGHT), "the test")


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_encodings_give_nearly_its_pixels(tmp_path, name):
    path = tmp_path / name
    LOSSY[name](path)
    difference = np.asarray(load_image(path)).astype(int) - SMOOTH
    assert np.abs(difference).max() <= 4
    assert picture_size(path) == (WIDTH, HEIGHT)
    check_picture(path, (WIDTH, HEIGHT), "the test")


@pytest.mark.parametrize("kind", ["rgba", "grey_alpha", "rgb_key", "grey_key", "grey16_key"])
def test_what_is_transparent_is_white(tmp_path, kind):
    path, hidden = tmp_path / "a.png", COLOURS == 0
    alpha = np.where(hidden, 0, 255).astype(np.uint8)
    noise = np.where(hidden[..., None], RGB // 2 + 7, RGB)
    if kind == "rgba":
        Image.fromarray(np.dstack([noise, alpha])).save(path)
    elif kind == "grey_alpha":
        Image.fromarray(np.dstack([np.where(hidden, 90, COLOURS), alpha])).save(path)
    elif kind == "rgb_key":
        Image.fromarray(np.where(hidden[..., None], np.uint8([1, 2, 3]), RGB)).save(path, transparency=(1, 2, 3))
    elif kind == "grey_key":
        Image.fromarray(COLOURS).save(path, transparency=0)
    else:
        Image.fromarray(np.where(hidden, 77, COLOURS.astype(np.uint16) * 257).astype(np.uint16)).save(
            path, transparency=77
        )
    loaded, expected = np.asarray(load_image(path)), RGB if kind.startswith("rgb") else GREY
    assert (loaded[hidden] == 255).all()
    np.testing.assert_array_equal(loaded[~hidden], expected[~hidden])


def test_half_transparency_lets_the_white_through(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(np.asarray(load_image(tmp_path / "a.png")).astype(int) - 127).max() <= 1


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_bomb(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path, format="PNG")


def truncated(share: float, **options: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, **options)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return write


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "empty or in no known format"),
    "text": (lambda path: path.write_text("404 not found"), "no known format"),
    "folder": (Path.mkdir, "folder of that name"),
    "pipe": (os.mkfifo, "not a regular file"),
    "link loop": (make_loop, "cannot be read: Too many levels of symbolic links"),
    "dead link": (lambda path: path.symlink_to("nowhere"), "the link leads nowhere"),
    "missing": (lambda path: None, "image not found"),
    "bomb": (make_bomb, "400000000 pixels"),
    "half a JPEG": (truncated(0.5, format="JPEG"), "truncated"),
    "nearly a whole JPEG": (truncated(0.99, format="JPEG"), "truncated"),
    "half a PNG": (truncated(0.5, format="PNG"), "truncated"),
    "half a WebP": (truncated(0.5, format="WEBP"), "cannot read image"),
    "half a GIF": (truncated(0.5, format="GIF"), "cannot read image"),
    "half a TIFF": (truncated(0.5, format="TIFF"), "cannot read image"),
    "half a BMP": (truncated(0.5, format="BMP"), "truncated"),
    "float": (lambda path: Image.new("F", (4, 4)).save(path, format="TIFF"), "floating-point pixels"),
    "32 bits": (lambda path: Image.new("I", (4, 4)).save(path, format="TIFF"), "32-bit pixels"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize(
    "read", [load_image, lambda path: check_picture(path, None, "the test")], ids=["load", "check"]
)
def test_what_is_no_picture_is_named_in_one_line(tmp_path, case, read):
    write, reason = BAD[case]
    path = tmp_path / "picture.jpg"
    write(path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message and reason in message
    assert "\n" not in message and len(message) < 400 and "0x" not in message


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_no_part_of_a_picture_passes_for_the_whole(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    for length in range(0, len(content) - 12, 23):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cannot read image .*a\."):
            check_picture(path, (24, 24), "the test")


def test_bytes_behind_the_picture_are_no_damage(tmp_path):
    """Phones append films to their JPEGs."""
    for suffix in ("jpg", "png"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(RGB).save(path)
        path.write_bytes(path.read_bytes() + b"more")
        check_picture(path, (WIDTH, HEIGHT), "the test")


def test_the_size_is_the_upright_one_and_both_are_named(tmp_path):
    path = tmp_path / "a.jpg"
    turned(6, RGB)(path)
    with pytest.raises(ValueError, match=r"a\.jpg is 10x6 upright \(stored as 6x10, EXIF orientation 6\), but x\.json"
                                         r" says 6x10: turn the stored pixels"):  # fmt: skip
        check_picture(path, (HEIGHT, WIDTH), "x.json")
    with pytest.raises(ValueError, match=r"is 10x6 .*says 7x7$"):
        check_picture(path, (7, 7), "x.json")


def test_what_was_read_already_is_looked_at_without_a_file(tmp_path: Path) -> None:
    save_png(RGB, tmp_path / "a.png", {"prompt": "a dog", "über": "✓"})
    content = (tmp_path / "a.png").read_bytes()
    assert content_size(content, "a.png") == (WIDTH, HEIGHT)
    assert png_text(content, "a.png") == {"prompt": "a dog", "über": "✓"}
    Image.fromarray(RGB).save(tmp_path / "a.jpg")
    assert png_text((tmp_path / "a.jpg").read_bytes(), "a.jpg") == {}
    for read in (content_size, png_text):
        with pytest.raises(ValueError, match=r"cannot read image a\.png"):
            read(b"no picture", "a.png")
