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
        shapes = [(annotation, self._pixels(annotation)) for annotation in self.annotations]
        for annotation, pixels in sorted(shapes, key=lambda s: (not s[0].get("iscrowd"), -s[1].sum())):
            label = IGNORE if annotation.get("iscrowd") else 1 + self.places[annotation["category_id"]]
            labels[pixels] = label
        return (labels > 0).astype(np.float32) if self.salient else labels

    def _pixels(self, annotation: dict[str, Any]) -> np.ndarray:
        from pycocotools import mask

        try:
            shape = annotation["segmentation"]
            if isinstance(shape, list):
                shape = mask.merge(mask.frPyObjects(shape, *self.size))
            elif isinstance(shape["counts"], list):
                shape = mask.frPyObjects(shape, *self.size)
            pixels = mask.decode(shape).astype(bool)
        except Exception as error:  # pycocotools raises bare Exceptions
            what = f"annotation {annotation['id']} cannot be read: {type(error).__name__} {error}"
            raise ValueError(f"{self.source}: {what}") from error
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
        train: JSON file of annotations (instances or stuff) below ``root``.
        test: likewise.
        train_images: folder of images below ``root``.
        test_images: likewise.
        categories: names of the categories to use, in the order of their classes 1, 2, ...; default: all of the
            training file, by id. What belongs to others is background.
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
        self._files: dict[Path, Any] = {}

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        if split == "val":
            return [], []
        if split not in self._read:
            root = find_folder(self.root)
            names, _ = self._categories(root / self.files["train"][0])
            annotations, images = (root / part for part in self.files[split])
            self._read[split] = self._load(annotations, images, names)
        return self._read[split]

    @property
    def labels(self) -> tuple[int, int] | None:  # type: ignore[override]
        if self.key == "mask":
            return None
        names, _ = self._categories(find_folder(self.root) / self.files["train"][0])
        return 1 + len(names), IGNORE

    def _categories(self, path: Path) -> tuple[list[str], dict[str, int]]:
        """The names of the categories to use, in the order of their classes, and the ids of all that a file lists."""
        listed = sorted(self._open(path).cats.items())
        ids = {category["name"]: i for i, category in listed}
        if len(ids) < len(listed):
            names = [category["name"] for _, category in listed]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path}: two categories are called {twice!r}")
        names = list(ids) if self.categories is None else list(self.categories)
        if len(names) >= IGNORE:
            raise ValueError(f"{path}: has {len(names)} categories; expected at most {IGNORE - 1}: name those to use")
        return names, ids

    def _load(self, path: Path, images: Path, names: list[str]) -> tuple[list[Sample], list[str]]:
        coco, (_, ids) = self._open(path), self._categories(path)
        for name in names:
            check_name(name, ids, f"category of {path}")
        samples, problems = [], []
        if self.categories is None:
            problems = [f"{path}: the training annotations have no category {n!r}" for n in ids.keys() - set(names)]
        places = {ids[name]: place for place, name in enumerate(names)}
        for i, image in sorted(coco.imgs.items()):
            lacking = [key for key in ("file_name", "height", "width") if key not in image]
            if lacking:
                problems.append(f"{path}: image {i} lacks {', '.join(lacking)}")
                continue
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

    def _open(self, path: Path) -> Any:
        """A COCO file, read once."""
        from pycocotools.coco import COCO

        if not path.is_file():
            raise ValueError(f"no annotations {str(path)!r}")
        if path not in self._files:
            with contextlib.redirect_stdout(io.StringIO()):  # it tells how long it took
                try:
                    self._files[path] = COCO(str(path))
                except (ValueError, KeyError, TypeError, AssertionError) as error:
                    raise ValueError(f"{path}: is no COCO file: {type(error).__name__} {error}") from error
        return self._files[path]
