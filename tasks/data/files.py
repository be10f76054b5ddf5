"""Images with a map of labels each: pairing, reading, and a listing of everything that is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

EXIF_ORIENTATION = 0x0112

Masks = Literal["binary", "threshold", "graded"]


class Sample(NamedTuple):
    """An image and its label map: ``read()`` gives (H, W), and raises a ValueError or OSError that names its source."""

    image: Path
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class LabelFile:
    """A label map in an image file: (H, W) uint8, the class of every pixel.

    Args:
        path: 8-bit grey or palette image.
        classes: number of classes; labels are 0 .. classes - 1.
        ignore_index: the label of pixels that have none.
    """

    path: Path
    classes: int
    ignore_index: int

    def __call__(self) -> np.ndarray:
        labels = _read_grey(self.path, ("L", "P", "1"))
        strange = sorted(set(np.unique(labels).tolist()) - {*range(self.classes), self.ignore_index})
        if strange:
            raise ValueError(
                f"{self.path}: has the label{'s' * (len(strange) > 1)} {', '.join(map(str, strange[:5]))}; expected "
                f"0 .. {self.classes - 1}, or {self.ignore_index} for pixels without one"
            )
        return labels


@dataclass(frozen=True)
class SaliencyFile:
    """A saliency mask in an image file: (H, W) float32 in [0, 1].

    Args:
        path: 8-bit image, 0 .. 255 (or 0 and 1).
        masks: ``"binary"``: any other value is an error. ``"threshold"``: salient where over one half. ``"graded"``: as
            it is.
    """

    path: Path
    masks: Masks = "binary"

    def __call__(self) -> np.ndarray:
        grey = _read_grey(self.path, ("L", "1", "P", "LA", "RGB", "RGBA"), convert=True)
        highest = 1 if grey.max() == 1 else 255
        if self.masks == "binary" and not np.isin(grey, (0, highest)).all():
            raise ValueError(
                f"{self.path}: is not binary ({len(np.unique(grey))} values; expected 0 and 255): say masks: threshold "
                "or, to train on it as it is, masks: graded"
            )
        if self.masks == "threshold" and 1 < grey.max() < 128 and len(np.unique(grey)) <= 2:
            raise ValueError(f"{self.path}: its two values are 0 and {grey.max()}, so that nothing is over one half")
        mask = grey.astype(np.float32) / highest
        return mask if self.masks == "graded" else (mask > 0.5).astype(np.float32)


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8."""
    image = _open(path)
    if image.mode[0] in "IF":
        raise ValueError(f"{path}: an image of more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        raise ValueError(f"{path}: its EXIF data say that it is to be turned; its mask would not be: save it upright")
    return np.asarray(image.convert("RGB"))


def _read_grey(path: Path, modes: Collection[str], convert: bool = False) -> np.ndarray:
    image = _open(path)
    if image.mode not in modes:
        bits = "16 bits" if image.mode.startswith("I") else f"the mode {image.mode}"
        raise ValueError(f"{path}: a mask of {bits} a pixel; expected one channel of 8 bits")
    return np.asarray(image.convert("L") if convert or image.mode == "1" else image)


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"{path}: is not there")
    if not path.stat().st_size:
        raise ValueError(f"{path}: is empty")
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # whatever a decoder raises
        raise ValueError(f"{path}: cannot be read: {error}") from error
    return image


def find_folder(path: str | Path, make: bool = False) -> Path:
    """A folder whose name may hold environment variables, as in ``$PADPROBE_DATA/CamVid``.

    Args:
        path: its name.
        make: make it where it is not there.

    Raises:
        ValueError: for a variable that is not set, or a folder that is not there.
    """
    folder = Path(os.path.expandvars(path)).expanduser()
    if "$" in str(folder):
        raise ValueError(f"data folder {str(path)!r}: the environment variable is not set; set it, or give the path")
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise ValueError(f"no data folder {str(folder)!r}")
    return folder


def pair(
    images: Path, masks: Path, mask: Callable[[Path], Callable[[], np.ndarray]], one_folder: bool = False
) -> tuple[list[Sample], list[str]]:
    """Images and masks of the same stem, in the order of their names.

    Args:
        images: folder of images.
        masks: folder of masks.
        mask: makes what reads a mask from its path.
        one_folder: both lie in one folder; masks are its PNG files.

    Returns:
        The pairs, and a line for everything that is not one half of a pair.
    """
    by_stem: list[dict[str, Path]] = []
    problems: list[str] = []
    for folder, wanted in ((images, lambda s: s != ".png"), (masks, lambda s: s == ".png")):
        found: dict[str, Path] = {}
        if not folder.is_dir():
            raise ValueError(f"no data folder {str(folder)!r}")
        for path in sorted(folder.iterdir()):
            suffix = path.suffix.lower()
            if path.name.startswith(".") or path.name == "Thumbs.db":
                continue
            if path.is_dir() or suffix not in SUFFIXES:
                problems.append(f"{path}: is no image ({', '.join(SUFFIXES)})")
                continue
            if one_folder and not wanted(suffix):
                continue
            if path.stem in found:
                problems.append(f"{path}: has the stem of {found[path.stem].name}")
            found.setdefault(path.stem, path)
        by_stem.append(found)
    pictures, labels = by_stem
    problems += [f"{path}: an image without a mask" for stem, path in pictures.items() if stem not in labels]
    problems += [f"{path}: a mask without an image" for stem, path in labels.items() if stem not in pictures]
    problems = list(dict.fromkeys(problems))  # of one folder, seen twice
    samples = [Sample(path, mask(labels[stem])) for stem, path in pictures.items() if stem in labels]
    if not samples:
        problems.append(f"{images}: no image has a mask in {masks}")
    return samples, problems


def check_samples(samples: Sequence[Sample]) -> list[str]:
    """Reads every image and label map; a line for each that is empty, unreadable, out of range, or of another size."""

    def check(sample: Sample) -> list[str]:
        problems, shapes = [], []
        for read in (lambda: read_image(sample.image), sample.read):
            try:
                shapes.append(read().shape[:2])
            except (ValueError, OSError) as error:
                problems.append(str(error))
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            (h, w), (mh, mw) = shapes
            problems.append(f"{sample.image}: is {w} x {h} px, its mask {mw} x {mh}")
        return problems

    with ThreadPoolExecutor() as pool:
        return [problem for problems in pool.map(check, samples) for problem in problems]
