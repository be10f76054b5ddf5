"""COCO's format: instances or stuff as semantic labels, or as what is salient."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from padprobe.errors import check_name
from tasks.data.dense import DenseData
from tasks.data.files import Sample, find_folder

IGNORE = 255


@dataclass(frozen=True)
class CocoLabels:
    """One image's annotations as a label map.

    Semantic: (H, W) uint8, 0 where there is none, else 1 + the place of the category; where instances overlap, the
    smaller one lies on top; the pixels of a crowd that nothing else covers are 255, to be ignored. Saliency: (H, W)
    float32, 1 on every instance, crowds as well.
    """

    source: str
    size: tuple[int, int]
    annotations: list[dict[str, Any]] = field(repr=False)
    places: dict[int, int] = field(repr=False)
    salient: bool

    def __call__(self) -> np.ndarray:
        labels = np.zeros(self.size, np.uint8)
        for annotation in sorted(self.annotations, key=lambda a: (not a.get("iscrowd"), -a.get("area", 0))):
            label = IGNORE if annotation.get("iscrowd") else 1 + self.places[annotation["category_id"]]
            labels[self._pixels(annotation)] = label
        return (labels > 0).astype(np.float32) if self.salient else labels

    def _pixels(self, annotation: dict[str, Any]) -> np.ndarray:
        from pycocotools import mask

        shape = annotation["segmentation"]
        try:
            if isinstance(shape, list):
                shape = mask.merge(mask.frPyObjects(shape, *self.size))
            elif isinstance(shape["counts"], list):
                shape = mask.frPyObjects(shape, *self.size)
            pixels = mask.decode(shape).astype(bool)
        except Exception as error:  # pycocotools raises bare Exceptions
            raise ValueError(f"{self.source}: annotation {annotation['id']} cannot be read: {error}") from error
        if pixels.shape != self.size:
            raise ValueError(
                f"{self.source}: annotation {annotation['id']} is {pixels.shape[1]} x {pixels.shape[0]} px, its image "
                f"{self.size[1]} x {self.size[0]}"
            )
        return pixels


class CocoData(DenseData):
    """A data set in COCO's format, as semantic labels (the background and every category) or saliency masks.

    Args:
        root: the data set's folder; environment variables are filled in.
        train, test: JSON files of annotations (instances or stuff) below ``root``.
        train_images, test_images: folders of images below ``root``.
        categories: names of the categories to use, in the order of their classes 1, 2, ...; default: all, by id. What
            belongs to others is background.
        target: ``"labels"`` or, without categories, ``"mask"``: what is on any instance.
        options: see :class:`~tasks.data.dense.DenseData`. Validation images are held out from ``train``.
    """

    def __init__(
        self,
        root: str,
        train: str = "annotations/instances_train2017.json",
        test: str = "annotations/instances_val2017.json",
        train_images: str = "train2017",
        test_images: str = "val2017",
        categories: Sequence[str] | None = None,
        target: Literal["labels", "mask"] = "labels",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_name(target, ("labels", "mask"), "target")
        self.key, self.root, self.categories = target, root, categories
        self.files = {"train": (train, train_images), "test": (test, test_images)}
        self._read: dict[str, tuple[list[Sample], list[str]]] = {}

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        if split == "val":
            return [], []
        if split not in self._read:
            root = find_folder(self.root)
            annotations, images = (root / part for part in self.files[split])
            self._read[split] = self._load(annotations, images)
        return self._read[split]

    def _load(self, path: Path, images: Path) -> tuple[list[Sample], list[str]]:
        from pycocotools.coco import COCO

        if not path.is_file():
            raise ValueError(f"no annotations {str(path)!r}")
        with contextlib.redirect_stdout(io.StringIO()):  # it tells how long it took
            try:
                coco = COCO(str(path))
            except (ValueError, KeyError, AssertionError) as error:
                raise ValueError(f"{path}: is no COCO file: {error}") from error
        ids = {category["name"]: i for i, category in sorted(coco.cats.items())}
        names = list(ids) if self.categories is None else list(self.categories)
        for name in names:
            check_name(name, ids, f"category of {path}")
        if len(names) >= IGNORE:
            raise ValueError(f"{path}: has {len(names)} categories; expected at most {IGNORE - 1}: name those to use")
        places = {ids[name]: place for place, name in enumerate(names)}
        samples, problems = [], []
        for i, image in sorted(coco.imgs.items()):
            found = coco.imgToAnns.get(i, [])
            source = f"{path} (image {i}, {image['file_name']})"
            problems += [
                f"{source}: annotation {a['id']} has the category {a['category_id']}, which the file does not list"
                for a in found
                if a["category_id"] not in coco.cats
            ]
            used = [a for a in found if a["category_id"] in places]
            size = (image["height"], image["width"])
            samples.append(
                Sample(images / image["file_name"], CocoLabels(source, size, used, places, self.key == "mask"))
            )
        strangers = sorted({a["image_id"] for a in coco.anns.values()} - set(coco.imgs))
        problems += [f"{path}: annotations of the image {i}, which the file does not list" for i in strangers]
        if not samples:
            problems.append(f"{path}: has no images")
        return samples, problems
