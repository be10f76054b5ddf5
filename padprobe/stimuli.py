"""The images that an encoder sees: constant images, noise, dead leaves or a folder (paper, section 3.2)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from padprobe.errors import check_number
from padprobe.images import IMAGE_SUFFIXES, find_images, read_image
from padprobe.maps import Size, size_pair

STIMULI = ("black", "white", "noise", "dead_leaves")
"""Names of the generated stimuli."""


class Images(Protocol):
    """A map-style data set. Its items are images (3, H, W), tuples that start with one, or dicts with an ``image``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def load_images(source: str | Path | Images, image_size: Size = 224, limit: int | None = None, seed: int = 0) -> Images:
    """Loads the images of a generated stimulus, a folder or a data set.

    Args:
        source: ``"black"`` or ``"white"`` (one image each), ``"noise"`` (8 images by default), ``"dead_leaves"`` (300
            images by default); a folder, which is searched with its subfolders; or a data set, which is used as it is.
        image_size: size of the images in pixels: (height, width), or one number for a square. Images of a folder are
            squashed to it, as the paper squashes them to a square.
        limit: the most images to use: a random sample of a folder or data set; the number of images of noise or dead
            leaves.
        seed: seed of the sample and of the generated stimuli.

    Raises:
        ValueError: for a name that is neither a stimulus nor a folder, a folder without images, an image that cannot be
            read, or a limit below 1.

    Example:
        >>> noise = load_images("noise", image_size=32, limit=5, seed=1)
        >>> len(noise), noise[0].shape
        (5, torch.Size([3, 32, 32]))
    """
    if isinstance(source, str) and not source:
        raise ValueError("the name of the image folder is empty: is an environment variable not set?")
    if limit is not None:
        check_number("limit", limit, int, least=1)
    if isinstance(source, (str, Path)):
        if source in ("black", "white"):
            return torch.full((1, 3, *size_pair(image_size)), float(source == "white"))  # type: ignore[return-value]
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
    """The image in an item of a data set, or the images in a batch: ``item``, ``item["image"]`` or ``item[0]``.

    Raises:
        ValueError: for a dictionary without an ``image``, or anything that is not a tensor.

    Example:
        >>> image_of({"image": torch.zeros(3, 8, 8), "mask": None}).shape
        torch.Size([3, 8, 8])
    """
    if isinstance(item, dict):
        if "image" not in item:
            raise ValueError(
                f"an item is a dictionary with the keys {', '.join(map(str, item))}; expected a key 'image'"
            )
        item = item["image"]
    elif isinstance(item, (tuple, list)):
        item = item[0]
    if not isinstance(item, Tensor):
        raise ValueError(
            f"an item is a {type(item).__name__}; expected an image tensor, a tuple that starts with one, or a "
            "dictionary with an 'image'"
        )
    return item


class ImageFolder(Dataset[Tensor]):
    """The images in a folder, squashed to one size: items of shape (3, H, W), float32 in [0, 1].

    All images are opened once at the start, so that a broken one is reported before the work and not in the middle.

    Args:
        folder: searched with its subfolders for jpg, png, bmp, webp and tif files, see
            :func:`~padprobe.images.find_images`. How a file is read: :func:`~padprobe.images.read_image`.
        image_size: (H, W) in pixels, or one number for a square.
        limit: use a random sample of at most this many images.
        seed: seed of the sample.

    Raises:
        ValueError: if the folder does not exist or holds no image, or for an image that cannot be read (with its path).

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> Image.new("RGB", (30, 20), "white").save(f"{folder.name}/one.png")
        >>> ImageFolder(folder.name, image_size=16)[0].shape
        torch.Size([3, 16, 16])
    """

    def __init__(self, folder: str | Path, image_size: Size = 224, limit: int | None = None, seed: int = 0) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            names = [*STIMULI, *(p.name for p in folder.parent.glob("*/"))]
            near = difflib.get_close_matches(folder.name, names)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{str(folder)!r} is neither a folder nor one of the stimuli {', '.join(STIMULI)}{hint}")
        paths = find_images(folder)
        if not paths:
            raise ValueError(f"no images in folder {str(folder)!r}: looked for {', '.join(IMAGE_SUFFIXES)} files")
        if limit is not None and limit < len(paths):
            chosen = np.random.default_rng(seed).permutation(len(paths))[:limit]
            paths = [paths[i] for i in sorted(chosen)]
        self.paths, self.size = paths, size_pair(image_size)
        for path in paths:  # about 2 ms per image
            read_image(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.fromarray(read_image(self.paths[index]))
        if image.size != self.size[::-1]:  # Pillow's sizes are (width, height)
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def dark_noise(n: int, image_size: Size = 224, seed: int = 0) -> Tensor:
    """Noise as dark as the authors' image: (n, 3, H, W), float32 in [0, 1], independent in every pixel and channel.

    Exponential with mean 25/255, clipped at 200/255. The authors' image has mean 25, standard deviation 24 and maximum
    200 (of 255); they do not state its distribution.

    Example:
        >>> noise = dark_noise(2, image_size=64)
        >>> noise.shape, round(noise.mean().item(), 1)
        (torch.Size([2, 3, 64, 64]), 0.1)
    """
    values = np.random.default_rng(seed).exponential(25, (n, 3, *size_pair(image_size))).clip(0, 200).round() / 255
    return torch.from_numpy(values.astype(np.float32))


def dead_leaves(n: int, image_size: Size = 224, seed: int = 0) -> Tensor:
    """Dead-leaves images: discs of random colours that cover one another; (n, 3, H, W), float32 in [0, 1].

    Radii follow the power law r^-3 from 0.03 S to 0.3 S, where S is the shorter side: the classical model of the
    statistics of natural images. 800 leaves fall on a square; other shapes have as many per area.
    Leaves also fall beyond the canvas, so the statistics of a pixel, or of a pair of pixels, do not depend on where it
    is: the stimulus is stationary. Image i depends on (seed, i, image_size) alone.

    Example:
        >>> leaves = dead_leaves(2, image_size=32, seed=3)
        >>> leaves.shape, torch.equal(leaves[:1], dead_leaves(1, image_size=32, seed=3))
        (torch.Size([2, 3, 32, 32]), True)
    """
    height, width = size = size_pair(image_size)
    side = min(size)
    smallest, largest = 0.03 * side, 0.3 * side
    count = round(800 * (height + 2 * largest) * (width + 2 * largest) / (side + 2 * largest) ** 2)
    images = np.empty((n, height, width, 3), np.float32)
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        images[i] = rng.random(3)
        for leaf in fall(rng, count, size, smallest, largest):
            where, inside = disc(leaf, size)
            images[i][where][inside] = rng.random(3)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def fall(rng: np.random.Generator, count: int, size: Size, smallest: float, largest: float) -> Iterator[np.ndarray]:
    """Random leaves (x, y, radius), in pixels, that fall on a canvas and beyond its border; the lowest comes first.

    Centres are uniform up to ``largest`` pixels outside the canvas, so that the canvas shows a part of an endless
    carpet. Leaves that miss the canvas are dropped.

    Args:
        rng: the source of random numbers.
        count: number of leaves, those that miss the canvas included.
        size: of the canvas: (height, width), or one number for a square.
        smallest: least radius.
        largest: greatest radius; radii between them follow r^-3.

    Example:
        >>> leaves = list(fall(np.random.default_rng(0), 10, size=32, smallest=2, largest=8))
        >>> len(leaves) <= 10, leaves[0].shape
        (True, (3,))
    """
    height, width = size_pair(size)
    u = rng.random(count)
    radius = (smallest**-2 - u * (smallest**-2 - largest**-2)) ** -0.5
    x, y = rng.uniform(-largest, [[width + largest], [height + largest]], (2, count))
    hits = (x + radius > 0) & (x - radius < width) & (y + radius > 0) & (y - radius < height)
    return iter(np.stack([x, y, radius], axis=1)[hits])


def disc(leaf: Sequence[float] | np.ndarray, size: Size) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of a disc (x, y, radius) that lies on a canvas: (rows, columns) slices and the mask inside them.

    Example:
        >>> (rows, columns), mask = disc((1.5, 1.5, 1.0), size=8)
        >>> mask.astype(int)[:3, :3].tolist()
        [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """
    where, dx, dy = window(leaf, size)
    return where, dx**2 + dy**2 <= leaf[2] ** 2


def window(leaf: Sequence[float] | np.ndarray, size: Size) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """A leaf's bounding box on a canvas: (rows, columns) slices, and the distances of its pixels from the leaf's centre
    along x, (1, w), and along y, (h, 1).

    Example:
        >>> (rows, columns), dx, dy = window((1.5, 6.5, 1.0), size=8)
        >>> rows, columns, dx.tolist()
        (slice(5, 8, None), slice(0, 4, None), [[-1.0, 0.0, 1.0, 2.0]])
    """
    x, y, radius = leaf
    height, width = size_pair(size)
    top, bottom = max(int(y - radius), 0), min(int(y + radius) + 2, height)
    left, right = max(int(x - radius), 0), min(int(x + radius) + 2, width)
    dx, dy = np.arange(left, right) + (0.5 - x), np.arange(top, bottom) + (0.5 - y)
    return (slice(top, bottom), slice(left, right)), dx[None, :], dy[:, None]
