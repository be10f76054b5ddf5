"""What an encoder is shown: constant images, noise, dead leaves, a folder of images (paper, section 3.2)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
STIMULI = ("black", "white", "noise", "dead_leaves")


class Images(Protocol):
    """A map-style data set: items are an image (3, H, W), a tuple that starts with one or a dict with an ``image``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def load_images(source: str | Path | Images, image_size: int = 224, limit: int | None = None, seed: int = 0) -> Images:
    """The images of a built-in stimulus, a folder or a data set.

    Args:
        source: ``"black"``, ``"white"`` (one image each), ``"noise"`` (8 images unless limited), ``"dead_leaves"``
            (300 unless limited); a folder, searched with its subfolders; or any data set of images, taken as it is.
        image_size: side in pixels; images from a folder are squashed to a square, as in the paper.
        limit: of a folder or data set, a random sample of at most so many; of noise and dead leaves, how many to make.
        seed: of the sample and of the generated stimuli.

    Raises:
        ValueError: for a name that is neither a stimulus nor a folder, a folder without images, an unreadable image.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least one image")
    if isinstance(source, (str, Path)):
        if source in ("black", "white"):
            return torch.full((1, 3, image_size, image_size), float(source == "white"))  # type: ignore[return-value]
        if source == "noise":
            return dark_noise(limit or 8, image_size, seed)  # type: ignore[return-value]
        if source == "dead_leaves":
            return dead_leaves(limit or 300, image_size, seed)  # type: ignore[return-value]
        return ImageFolder(source, image_size, limit, seed)
    if limit is not None and limit < len(source):
        chosen = np.random.default_rng(seed).permutation(len(source))[:limit]
        return torch.utils.data.Subset(source, sorted(chosen.tolist()))  # type: ignore[arg-type, return-value]
    return source


def image_of(item: Any) -> Tensor:
    """The image in a data set's item, or the images in a batch of them: the tensor itself, ``item["image"]`` or
    ``item[0]``."""
    if isinstance(item, dict):
        if "image" not in item:
            raise ValueError(f"a batch is a dictionary with keys {', '.join(map(str, item))}; expected an 'image' key")
        item = item["image"]
    elif isinstance(item, (tuple, list)):
        item = item[0]
    if not isinstance(item, Tensor):
        raise ValueError(
            f"expected an image tensor, a tuple that starts with one or a dict's 'image'; got {type(item)}"
        )
    return item


class ImageFolder(Dataset[Tensor]):
    """The images under a folder, squashed to a square, values in [0, 1]: items of shape (3, S, S), float32.

    Args:
        folder: searched with its subfolders for jpg, png, bmp, webp and tif files; hidden files are skipped.
        image_size: S in pixels.
        limit: take a random sample of at most so many.
        seed: of the sample.

    Raises:
        ValueError: where there is no such folder, no image in it, or (with its path) an image that cannot be read.
    """

    def __init__(self, folder: str | Path, image_size: int = 224, limit: int | None = None, seed: int = 0) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            names = [*STIMULI, *(p.name for p in folder.parent.glob("*/"))]
            near = difflib.get_close_matches(folder.name, names)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{str(folder)!r} is no folder, nor a stimulus out of {', '.join(STIMULI)}{hint}")
        paths = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
        )
        if not paths:
            raise ValueError(f"no images in folder {str(folder)!r}: looked for {', '.join(IMAGE_SUFFIXES)} files")
        if limit is not None and limit < len(paths):
            chosen = np.random.default_rng(seed).permutation(len(paths))[:limit]
            paths = [paths[i] for i in sorted(chosen)]
        self.paths, self.image_size = paths, image_size
        for path in paths:  # 2 ms an image: one that cannot be read is named before hours of work, not after
            try:
                with Image.open(path) as image:
                    image.load()
            except (UnidentifiedImageError, OSError) as error:
                raise ValueError(f"cannot read image {str(path)!r}: {error}") from error

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"cannot read image {str(path)!r}: {error}") from error
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def dark_noise(n: int, image_size: int = 224, seed: int = 0) -> Tensor:
    """Noise as dark as the authors' one image: (n, 3, S, S) in [0, 1], independent in every pixel and channel.

    Exponential with mean 25/255, clipped at 200/255: the authors' image has mean 25, standard deviation 24 and maximum
    200 of 255. They do not state its distribution.
    """
    values = np.random.default_rng(seed).exponential(25, (n, 3, image_size, image_size)).clip(0, 200).round() / 255
    return torch.from_numpy(values.astype(np.float32))


def dead_leaves(n: int, image_size: int = 224, seed: int = 0) -> Tensor:
    """Dead-leaves images: (n, 3, S, S) in [0, 1]; discs of random colour that cover one another.

    Radii follow the power law r^-3 from .03 S to .3 S, the classical model of the statistics of natural images. Leaves
    fall beyond the canvas too, so every pixel and pair of pixels has the same statistics: a stationary stimulus.
    Image i depends on (seed, i, image_size) alone.
    """
    images = np.empty((n, image_size, image_size, 3), np.float32)
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        images[i] = rng.random(3)
        for leaf in fall(rng, 800, image_size, 0.03 * image_size, 0.3 * image_size):
            where, inside = disc(leaf, image_size)
            images[i][where][inside] = rng.random(3)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def fall(rng: np.random.Generator, count: int, size: int, smallest: float, largest: float) -> Iterator[np.ndarray]:
    """Leaves (x, y, radius) in pixels that fall on a canvas of ``size`` and beyond its border, the lowest first.

    Radii follow r^-3 between ``smallest`` and ``largest``; centres are uniform up to ``largest`` outside the canvas, so
    that the canvas shows a cut-out of an endless carpet. Leaves that miss the canvas are left out.
    """
    u = rng.random(count)
    radius = (smallest**-2 - u * (smallest**-2 - largest**-2)) ** -0.5
    x, y = rng.uniform(-largest, size + largest, (2, count))
    hits = (x + radius > 0) & (x - radius < size) & (y + radius > 0) & (y - radius < size)
    return iter(np.stack([x, y, radius], axis=1)[hits])


def disc(leaf: Sequence[float] | np.ndarray, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of a disc (x, y, radius) on a canvas: (rows, columns) slices and the mask inside them."""
    where, dx, dy = window(leaf, size)
    return where, dx**2 + dy**2 <= leaf[2] ** 2


def window(leaf: Sequence[float] | np.ndarray, size: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """A leaf's bounding box on a canvas: (rows, columns) slices, and its pixels' offsets from the centre along x (1, w)
    and y (h, 1)."""
    x, y, radius = leaf
    top, bottom = max(int(y - radius), 0), min(int(y + radius) + 2, size)
    left, right = max(int(x - radius), 0), min(int(x + radius) + 2, size)
    dx, dy = np.arange(left, right) + (0.5 - x), np.arange(top, bottom) + (0.5 - y)
    return (slice(top, bottom), slice(left, right)), dx[None, :], dy[:, None]
