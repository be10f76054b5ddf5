"""Images and their label maps in files: pairs them, reads them, and lists everything that is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from padprobe.images import IMAGE_SUFFIXES, open_image, printable
from padprobe.images import read_image as read_rgb

Masks = Literal["binary", "threshold", "graded"]


class Sample(NamedTuple):
    """An image and its label map: ``read()`` returns (H, W), or raises a ValueError or OSError that names the file."""

    image: Path
    read: Callable[[], np.ndarray]


def read_labels(path: Path, classes: int, ignore_index: int) -> np.ndarray:
    """The classes 0 .. ``classes`` - 1, or ``ignore_index``, in an 8-bit grey or palette image: (H, W) uint8.

    Raises:
        ValueError: for another value, or a file that is no such image.
    """
    labels = _read_grey(path, ("L", "P", "1"))
    unknown = sorted(set(np.unique(labels).tolist()) - {*range(classes), ignore_index})
    if unknown:
        raise ValueError(
            f"{printable(path)}: has the label{'s' * (len(unknown) > 1)} {', '.join(map(str, unknown[:5]))}; expected "
            f"0 .. {classes - 1}, or {ignore_index} for pixels without a label"
        )
    return labels


def read_saliency(path: Path, masks: Masks = "binary") -> np.ndarray:
    """The saliency mask in an 8-bit image with values 0 .. 255 (or 0 and 1): (H, W) float32 in [0, 1].

    What ``masks`` means: see :class:`~tasks.data.saliency.SaliencyFolder`.

    Raises:
        ValueError: for values that do not suit ``masks``, or a file that is no such image.
    """
    grey = _read_grey(path, ("L", "1", "P", "LA", "RGB", "RGBA"), convert=True)
    highest = 1 if grey.max() == 1 else 255
    if masks == "binary" and not np.isin(grey, (0, highest)).all():
        raise ValueError(
            f"{printable(path)}: is not binary ({len(np.unique(grey))} values; expected 0 and 255): set masks: "
            "threshold or, to keep the values, masks: graded"
        )
    if masks == "threshold" and 1 < grey.max() < 128 and len(np.unique(grey)) <= 2:
        raise ValueError(f"{printable(path)}: its two values are 0 and {grey.max()}; nothing is over half of 255")
    mask = grey.astype(np.float32) / highest
    return mask if masks == "graded" else (mask > 0.5).astype(np.float32)


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8, see :func:`~padprobe.images.read_image`; one that EXIF rotates is refused."""
    return read_rgb(path, refuse_rotated=True)


def _read_grey(path: Path, modes: Collection[str], convert: bool = False) -> np.ndarray:
    image = open_image(path, refuse_rotated=True)
    if image.mode not in modes:
        bits = "16 bits" if image.mode.startswith("I") else f"the mode {image.mode}"
        raise ValueError(f"{printable(path)}: a mask of {bits} per pixel; expected one channel of 8 bits")
    return np.asarray(image.convert("L") if convert or image.mode == "1" else image)


def find_folder(path: str | Path, make: bool = False) -> Path:
    """A folder, given by a path that may contain environment variables; with ``make``, it is created if necessary.

    Raises:
        ValueError: for a variable that is not set, or a folder that does not exist.
    """
    folder = Path(os.path.expandvars(path)).expanduser()
    if "$" in str(folder):
        raise ValueError(f"data folder {str(path)!r}: the environment variable is not set; set it, or give the path")
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise ValueError(f"no data folder {str(folder)!r}")
    return folder


def pair(images: Path, masks: Path, read: Callable[[Path], np.ndarray]) -> tuple[list[Sample], list[str]]:
    """Images and masks with the same stem, in the order of their names; and one line for each file without a partner.

    Args:
        images: folder of images.
        masks: folder of masks. If both are one folder, its PNG files are the masks and its other files the images.
        read: reads a mask.
    """
    one_folder = images == masks
    image_files, problems = _by_stem(images, lambda suffix: not one_folder or suffix != ".png")
    mask_files, mask_problems = _by_stem(masks, lambda suffix: not one_folder or suffix == ".png")
    problems = list(dict.fromkeys(problems + mask_problems))  # one folder lists its problems twice
    problems += [
        f"{printable(path)}: an image without a mask" for stem, path in image_files.items() if stem not in mask_files
    ]
    problems += [
        f"{printable(path)}: a mask without an image" for stem, path in mask_files.items() if stem not in image_files
    ]
    samples = [
        Sample(path, partial(read, mask_files[stem])) for stem, path in image_files.items() if stem in mask_files
    ]
    if not samples:
        problems.append(f"{printable(images)}: no image has a mask in {printable(masks)}")
    return samples, problems


def _by_stem(folder: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Path], list[str]]:
    """A folder's image files with a wanted suffix, by stem, and one line for each other file and repeated stem."""
    files: dict[str, Path] = {}
    problems = []
    for path in sorted(find_folder(folder).iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or path.name == "Thumbs.db":
            continue
        if path.is_dir() or suffix not in IMAGE_SUFFIXES:
            problems.append(f"{printable(path)}: is no image ({', '.join(IMAGE_SUFFIXES)})")
        elif wanted(suffix):
            if path.stem in files:
                problems.append(f"{printable(path)}: has the same stem as {files[path.stem].name}")
            files.setdefault(path.stem, path)
    return files, problems


def check_samples(samples: Sequence[Sample]) -> list[str]:
    """Reads all images and label maps; one line for each that is empty, unreadable, out of range or of another size."""

    def check(sample: Sample) -> list[str]:
        problems, shapes = [], []
        for read in (lambda: read_image(sample.image), sample.read):
            try:
                shapes.append(read().shape[:2])
            except (ValueError, OSError) as error:
                problems.append(str(error))
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            (h, w), (mh, mw) = shapes
            problems.append(f"{printable(sample.image)}: is {w} x {h} px, its mask {mw} x {mh}")
        return problems

    with ThreadPoolExecutor() as pool:
        return [problem for problems in pool.map(check, samples) for problem in problems]
