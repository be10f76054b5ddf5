"""Dead-leaves scenes with salient objects, semantic labels and image classes, made on the fly from a seed."""

from __future__ import annotations

import colorsys
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from padprobe.network.tap import center_crop
from padprobe.stimuli import disc, fall, window
from tasks.data.order import ShuffleByEpoch

GROUND, PLANT, SKY, WATER, OBJECT = range(5)
SIDES = (0, 4, 3)  # of the leaves of each image class: discs, squares, triangles
# hue, saturation, value; the colour of each leaf differs from these by a few hundredths
LEAF_COLORS = [(0.08, 0.35, 0.5), (0.33, 0.5, 0.45), (0.53, 0.35, 0.9), (0.66, 0.7, 0.35)]
LOOK_ALIKE_COLOR = (0.6, 0.55, 0.7)  # of sky and water, if only their position tells them apart
OBJECT_COLOR, DISTRACTOR_COLOR = (0.92, 0.8, 0.95), (0.13, 0.8, 0.95)


class Scenes(Dataset[dict[str, Any]]):
    """Scenes of overlapping leaves with about three objects on top, and labels for three tasks.

    Leaves are ground, plant, sky or water. All leaves of a scene have the same shape, the image's class: disc, square
    or triangle. Leaves and objects also fall outside the canvas, so the *images* are stationary at every setting:
    nothing in them shows where the border is. Only the *labels* depend on position, in a share ``position_dependence``
    of the scenes:

    - in a scene whose labels depend on appearance, objects have two colours, of which one is salient, and sky and water
      have different colours;
    - in a scene whose labels depend on position, all objects look the same, and the one nearest to the centre is
      salient; sky and water look the same, and a leaf is sky if its centre is in the upper half.

    Items are dictionaries: ``image`` float32 (3, S, S) in [0, 1]; ``mask`` float32 (1, S, S), 1 on salient objects, 0
    elsewhere; ``labels`` int64 (S, S), ground, plant, sky, water, object; ``label``, the image's class. Scene i depends
    only on (seed, i) and the settings.

    Args:
        n: number of scenes.
        image_size: S in pixels.
        position_dependence: probability in [0, 1] that a scene's labels depend on position.
        seed: seed of the scenes.
        context: width in pixels of the margin around the labelled area that images also show: they are then
            (3, S + 2 context, S + 2 context).

    Example:
        >>> scene = Scenes(n=3, image_size=32, context=4)[0]
        >>> [tuple(scene[key].shape) for key in ("image", "mask", "labels")]
        [(3, 40, 40), (1, 32, 32), (32, 32)]
    """

    def __init__(
        self, n: int = 500, image_size: int = 96, position_dependence: float = 1.0, seed: int = 0, context: int = 0
    ) -> None:
        if not 0 <= position_dependence <= 1:
            raise ValueError(f"position_dependence is {position_dependence}; expected a number in [0, 1]")
        if n < 1 or image_size < 16:
            raise ValueError(f"n is {n} and image_size {image_size}; expected at least 1 scene of 16 px")
        self.n, self.image_size, self.position_dependence = n, image_size, position_dependence
        self.seed, self.context = seed, context

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.n:
            raise IndexError(f"scene {index} of {self.n}")
        scene = make_scene(self.seed, index, self.image_size, self.position_dependence, self.context)
        image, mask, labels = (torch.from_numpy(pixels) for pixels in scene[:3])
        size = self.image_size, self.image_size
        return {
            "image": image.permute(2, 0, 1).float() / 255,
            "mask": center_crop(mask, size)[None].float(),
            "labels": center_crop(labels, size).long(),
            "label": scene[3],
        }


@lru_cache(maxsize=4096)
def make_scene(
    seed: int, index: int, image_size: int, position_dependence: float, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """One scene of :class:`Scenes`, with its context: uint8 image, bool mask, uint8 labels and the image's class.

    The last 4,096 scenes are cached: making one takes longer than training a small network on it for one step.
    """
    rng = np.random.default_rng([seed, index])
    by_position = rng.random() < position_dependence
    label = int(rng.integers(len(SIDES)))
    size = image_size + 2 * context  # context changes neither the size nor the density of leaves and objects
    smallest, largest, radius = 0.07 * image_size, 0.35 * image_size, 0.11 * image_size
    leaves = list(
        fall(rng, round(140 * ((size + 2 * largest) / (image_size + 2 * largest)) ** 2), size, smallest, largest)
    )
    kinds = rng.choice(4, len(leaves), p=[0.3, 0.2, 0.25, 0.25])
    angles = rng.uniform(0, 2 * np.pi, len(leaves))
    colors = np.array(LEAF_COLORS)[kinds]
    if by_position:
        watery = kinds >= SKY
        colors[watery] = LOOK_ALIKE_COLOR
        kinds[watery] = np.where(np.array(leaves)[watery, 1] < size / 2, SKY, WATER)
    colors = _vary(rng, colors)

    image = np.empty((size, size, 3), np.float32)
    labels = np.full((size, size), GROUND, np.uint8)
    image[:] = _vary(rng, np.array([LEAF_COLORS[GROUND]]))[0]
    for leaf, kind, color, angle in zip(leaves, kinds, colors, angles, strict=True):
        where, inside = _shape(leaf, size, label, angle)
        image[where][inside] = color
        labels[where][inside] = kind

    count = round(3 * ((size + 2 * radius) / (image_size + 2 * radius)) ** 2)
    objects = rng.uniform(-radius, size + radius, (count, 2))
    salient = rng.random(count) < 1 / 3
    if by_position:
        salient = np.arange(count) == np.argmin(((objects - size / 2) ** 2).sum(1))
    hsv = np.array([OBJECT_COLOR if by_position or chosen else DISTRACTOR_COLOR for chosen in salient])
    mask = np.zeros((size, size), bool)
    for i, ((x, y), color) in enumerate(zip(objects, _vary(rng, hsv), strict=True)):
        where, inside = disc((x, y, radius), size)
        image[where][inside] = 1.0  # a white rim distinguishes objects from leaves
        labels[where][inside] = OBJECT
        mask[where][inside] = salient[i]
        where, inside = disc((x, y, 0.75 * radius), size)
        image[where][inside] = color
    image += rng.normal(0, 0.02, image.shape)  # camera noise
    return (image.clip(0, 1) * 255).round().astype(np.uint8), mask, labels, label


def _vary(rng: np.random.Generator, hsv: np.ndarray) -> np.ndarray:
    """Random RGB colours near the given ones: (N, 3) hue, saturation, value -> (N, 3)."""
    hsv = hsv + rng.normal(0, (0.015, 0.05, 0.06), hsv.shape)
    return np.array([colorsys.hsv_to_rgb(*c) for c in np.clip(hsv, 0, 1)])


def _shape(leaf: np.ndarray, size: int, label: int, angle: float) -> tuple[tuple[slice, slice], np.ndarray]:
    """The bounding slices and the mask of a leaf: a disc, or the regular polygon inscribed in it."""
    radius, sides = leaf[2], SIDES[label]
    if not sides:
        return disc(leaf, size)
    where, dx, dy = window(leaf, size)
    inside = np.ones((dy.size, dx.size), bool)
    for a in angle + 2 * np.pi * np.arange(sides) / sides:
        inside &= dx * np.cos(a) <= radius * np.cos(np.pi / sides) - dy * np.sin(a)
    return where, inside


class ScenesDataModule(LightningDataModule):
    """Training, validation and test scenes, made from different seeds.

    Args:
        train: number of training scenes.
        val: number of validation scenes.
        test: number of test scenes.
        image_size: side of the labelled area in pixels.
        position_dependence: probability in [0, 1] that a scene's labels depend on position, see :class:`Scenes`.
        batch_size: scenes per step.
        num_workers: number of processes that make scenes.
        seed: seed of all scenes and of the training order.
        context: width in pixels of the margin around the labelled area that images also show.
    """

    def __init__(
        self,
        train: int = 500,
        val: int = 100,
        test: int = 200,
        image_size: int = 96,
        position_dependence: float = 1.0,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.train, self.val, self.test = (
            Scenes(n, image_size, position_dependence, 3 * seed + k, context) for k, n in enumerate((train, val, test))
        )

    def _loader(self, scenes: Scenes, **options: Any) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(scenes, self.batch_size, num_workers=self.num_workers, **options)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(self.train, sampler=ShuffleByEpoch(self.train, self.seed), drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(self.test)

    def label_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The training scenes in order, for the position-only baseline."""
        return self._loader(self.train)
