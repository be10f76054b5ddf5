"""Finds and reads image files: one reader for the probe, the tasks and `padprobe data check`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
"""What a file may contain, whatever its ending; for others, such as EPS, Pillow may start other programs."""
_PHOTOMETRIC = 262  # TIFF's tag


def read_image(path: Path, refuse_rotated: bool = False) -> np.ndarray:
    """An image file as (H, W, 3) uint8.

    Grey, palette, CMYK and YCbCr images are converted to RGB. Transparency is dropped, as torchvision's loader does.
    16 bits are scaled to 8: 65,535 becomes 255.

    Args:
        path: of the file; its content decides its format, whatever its ending.
        refuse_rotated: see :func:`open_image`.

    Raises:
        ValueError: for a file that :func:`open_image` refuses; for integers or floats of 32 bits, whose range nothing
            states; for LAB and HSV; and for 16 bits of which at most 12 are used, because the image would be nearly
            black.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> Image.new("L", (30, 20), "white").save(f"{folder.name}/one.png")
        >>> read_image(Path(folder.name, "one.png")).shape
        (20, 30, 3)
    """
    image, name = open_image(path, refuse_rotated), printable(path)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):  # Pillow < 11 calls it "I"
        values = np.asarray(image)
        _refuse_dark(values.max(), 65535, name)
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        raise ValueError(
            f"{name}: has numbers of 32 bits (mode {image.mode}), from {low:g} to {high:g}, and nothing says which of "
            "them is white: scale it to 0 .. 255 and save it with 8 bits"
        )
    if image.mode in ("LAB", "HSV"):
        raise ValueError(f"{name}: has the colours {image.mode}: convert it to RGB")
    return np.asarray(image.convert("RGB"))


def open_image(path: Path, refuse_rotated: bool = False) -> Image.Image:
    """An image file, decoded and upright (its EXIF rotation is applied), in the mode in which it is stored.

    Args:
        path: of the file.
        refuse_rotated: whether to refuse an image that its EXIF data rotate, because they do not rotate its label map.

    Raises:
        ValueError: with the path, for a file that is empty, truncated, no image, or so large that Pillow takes it for
            a decompression bomb; and for an animation or several pages (a camera's MPO file counts as its first image).

    Example:
        >>> open_image(Path("nowhere.png"))
        Traceback (most recent call last):
        ValueError: nowhere.png: does not exist
    """
    name = printable(path)
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{name}: {'is empty' if path.is_file() else 'does not exist'}")
    try:
        # not by its name: Pillow would map some TIFFs that are stored on their side into memory, and shear them
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            colours = ";16" in str(image.tile) and not image.mode.startswith("I")
            # Pillow inverts such a TIFF only where it has 8 bits or fewer
            inverted = image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"{name}: cannot be read: {error}") from error
    if frames > 1:
        raise ValueError(f"{name}: holds {frames} images (an animation, or pages): save the one to use")
    if rotated and refuse_rotated:
        raise ValueError(f"{name}: its EXIF data rotate it, but not its mask: save it upright")
    if inverted:
        raise ValueError(f"{name}: its largest value is black (a TIFF of the kind WhiteIsZero): invert it")
    if colours:  # of 16 bits; Pillow keeps the upper 8
        _refuse_dark(np.asarray(image.convert("RGB")).max(), 255, name)
    return image


def _refuse_dark(brightest: np.integer, whole: int, name: str) -> None:
    if 0 < brightest < whole / 16:
        raise ValueError(
            f"{name}: has 16 bits per channel, but uses 12 or fewer (its largest value is {brightest} of {whole}), so "
            "it would be nearly black: scale it to the whole range, or save it with 8 bits"
        )


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted; hidden files and folders are skipped.

    Links are followed, and each real folder is searched once, so a link to a parent does no harm.

    Raises:
        ValueError: for a subfolder that cannot be read.

    Example:
        >>> find_images(Path("nowhere"))
        Traceback (most recent call last):
        ValueError: cannot read folder 'nowhere': No such file or directory
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read folder {printable(error.filename)!r}: {error.strerror}") from error

    seen, paths = set(), []
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)


def printable(path: str | Path) -> str:
    r"""A path for a message; bytes of a name that are not UTF-8, which a terminal refuses, are escaped.

    Example:
        >>> printable("caf\udce9.jpg")
        'caf\\xe9.jpg'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")
