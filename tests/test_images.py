import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from padprobe.images import find_images, open_image, printable, read_image
from padprobe.stimuli import ImageFolder
from tasks.data.files import read_image as read_for_task
from tasks.data.files import read_labels

RAMP = np.linspace(0, 255, 80).round().astype(np.uint8).reshape(8, 10)
DEEP = RAMP.astype(np.uint16) * 257  # the same picture in 16 bits
COLOURS = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=-1)


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG by hand: Pillow writes none with 16 bits of colour, or with more pixels than it has."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(pixels: np.ndarray) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, 0 if pixels.ndim == 2 else {3: 2, 4: 6}[pixels.shape[2]], rows)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(degrees_tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = degrees_tag
    return exif


GREY, RGB = np.repeat(RAMP[..., None], 3, 2), Image.fromarray(COLOURS)
FADED = Image.fromarray(np.dstack([COLOURS, 255 - RAMP]))  # transparent where RAMP is bright
READ = {
    "grey 8": (saved(Image.fromarray(RAMP), "PNG"), GREY),
    "grey 16 PNG": (deep_png(DEEP), GREY),
    "grey 16 TIFF": (saved(Image.fromarray(DEEP), "TIFF"), GREY),
    "grey + alpha": (saved(Image.fromarray(np.dstack([RAMP, RAMP])), "PNG"), GREY),
    "RGB": (saved(RGB, "PNG"), COLOURS),
    "RGB 16": (deep_png(COLOURS.astype(np.uint16) * 257), COLOURS),
    "RGBA 16": (deep_png(np.dstack([COLOURS, RAMP]).astype(np.uint16) * 257), COLOURS),
    "RGBA": (saved(FADED, "PNG"), COLOURS),
    "palette": (saved(RGB.quantize(256), "PNG"), np.asarray(RGB.quantize(256).convert("RGB"))),
    "palette with transparency": (saved(Image.fromarray(RAMP).convert("P"), "PNG", transparency=0), GREY),
    "CMYK": (saved(Image.fromarray(255 - COLOURS).convert("RGB").convert("CMYK"), "TIFF"), 255 - COLOURS),
    "YCbCr": (saved(RGB.convert("YCbCr"), "TIFF"), np.asarray(RGB.convert("YCbCr").convert("RGB"))),
    "1 bit": (saved(Image.fromarray(RAMP > 127), "PNG"), np.where(GREY > 127, 255, 0)),
    "white is zero": (saved(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0}), GREY),
    "1 x 1": (saved(RGB.crop((0, 0, 1, 1)), "BMP"), COLOURS[:1, :1]),
    "black 16": (deep_png(DEEP * 0), GREY * 0),
    "two photos of a camera": (saved(RGB, "MPO", save_all=True, append_images=[RGB], quality=100, subsampling=0), None),
}


@pytest.mark.parametrize("kind", READ)
def test_every_kind_of_image_is_read_alike_by_probe_and_tasks(tmp_path, kind):
    content, expected = READ[kind]
    path = tmp_path / "a.png"  # its content decides, not its ending
    path.write_bytes(content)
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    if expected is None:
        assert np.abs(pixels.astype(int) - COLOURS).mean() < 5
    else:
        assert np.array_equal(pixels, expected)
    assert np.array_equal(read_for_task(path), pixels)
    shown = ImageFolder(tmp_path, pixels.shape[0])[0]  # the probe's, squashed to a square
    assert abs(shown.mean() - pixels.mean() / 255) < 0.03


ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", RGB.size)]}
REFUSED = {
    "int32": (saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "32 bits .* from 0 to 65535, .* save it with 8"),
    "float": (saved(Image.fromarray(RAMP / np.float32(255)), "TIFF"), "32 bits .* from 0 to 1, and nothing says"),
    "12 of 16 bits": (deep_png(DEEP >> 4), "uses 12 or fewer .*4095 of 65535.* scale it to the whole range"),
    "12 of 16 bits of colour": (deep_png(COLOURS.astype(np.uint16) * 16), "uses 12 or fewer"),
    "inverted 16": (saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), "its largest value is black"),
    "LAB": (saved(Image.new("LAB", (10, 8)), "TIFF"), "has the colours LAB: convert it to RGB"),
    "animated PNG": (saved(RGB, "PNG", **ANIMATION), "holds 2 images"),
    "animated WebP": (saved(RGB, "WEBP", **ANIMATION), "holds 2 images"),
    "animated GIF": (saved(RGB, "GIF", **ANIMATION), "holds 2 images"),
    "pages": (saved(RGB, "TIFF", **ANIMATION), "holds 2 images .* save the one to use"),
    "empty": (b"", "is empty"),
    "truncated": (saved(RGB, "PNG")[:80], "cannot be read"),
    "text": (b"no image", "cannot be read"),
    "bomb": (png(60_000, 60_000, 8, 0, b""), "cannot be read: .*decompression bomb"),
    "PostScript": (saved(RGB, "EPS"), "cannot be read"),  # which Pillow gives to another program
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_right_is_refused_with_its_path(tmp_path, kind):
    content, message = REFUSED[kind]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (read_image, read_for_task, lambda path: ImageFolder(path.parent)):
        with pytest.raises(ValueError, match=f"{path}: .*{message}"):
            read(path)


def test_labels_of_16_bits_are_not_scaled(tmp_path):
    path = tmp_path / "labels.png"
    path.write_bytes(deep_png(DEEP))
    with pytest.raises(ValueError, match="a mask of 16 bits"):
        read_labels(path, 256, 255)
    assert np.array_equal(np.asarray(open_image(path)), DEEP)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_upright_where_there_is_no_mask(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    path.write_bytes(saved(RGB, kind, exif=turned(6)))
    assert read_image(path).shape == (10, 8, 3)
    with pytest.raises(ValueError, match="its EXIF data rotate it, but not its mask"):
        read_for_task(path)


def test_a_folder_is_searched_once_whatever_its_links_and_names(tmp_path):
    folder, outside = tmp_path / "data", tmp_path / "outside"
    for place in (folder / "a.jpg", folder / ".hidden", outside):
        place.mkdir(parents=True)
        (place / "x.PNG").write_bytes(READ["RGB"][0])
    (folder / "._b.png").write_bytes(b"of macOS")
    (folder / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(outside)
    (folder / "again").symlink_to(outside)
    odd = os.fsdecode(b"caf\xe9.png")
    (folder / odd).write_bytes(b"no image")
    assert find_images(folder) == [folder / "a.jpg" / "x.PNG", folder / "again" / "x.PNG", folder / odd]
    with pytest.raises(ValueError, match=r"caf\\xe9.png: cannot be read") as error:
        ImageFolder(folder)
    assert str(error.value).encode()
    assert printable(odd).isascii()


@pytest.mark.parametrize("orientation", range(10))
def test_an_image_stored_on_its_side_is_turned_in_every_kind_of_tiff(tmp_path, orientation):
    """Orientations 0 and 9 mean nothing, and nothing is turned."""
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(RAMP).save(tmp_path / "a.tif", exif=exif)
    flipped = {2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1], 5: RAMP.T, 6: np.rot90(RAMP, -1)}
    flipped |= {7: RAMP[::-1, ::-1].T, 8: np.rot90(RAMP)}
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], flipped.get(orientation, RAMP))
    if orientation in flipped:
        with pytest.raises(ValueError, match="EXIF data rotate it"):
            read_for_task(tmp_path / "a.tif")
    else:
        assert np.array_equal(read_for_task(tmp_path / "a.tif")[..., 0], RAMP)


def test_alpha_does_not_hide_that_an_image_is_nearly_black(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">4H", 3000, 3000, 3000, 65535) * 10 for _ in range(8))
    (tmp_path / "a.png").write_bytes(png(10, 8, 16, 6, rows))
    with pytest.raises(ValueError, match="12"):
        read_image(tmp_path / "a.png")
