"""Data sets in COCO's format, as semantic labels or saliency masks."""

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
    """The annotations of one image as a label map.

    Semantic: (H, W) uint8, 0 for the background, otherwise 1 + the index of the category. Where instances overlap, the
    smaller one is on top. Pixels of a crowd that nothing else covers are 255, to be ignored. Saliency: (H, W) float32,
    1 on all instances and crowds.

    Attributes:
        source: names the file and the image in messages.
        size: (H, W).
        annotations: COCO's annotations of the image, of the categories in ``indices``.
        indices: index of each category, by its COCO id.
        salient: whether to return a saliency mask.
    """

    source: str
    size: tuple[int, int]
    annotations: list[dict[str, Any]] = field(repr=False)
    indices: dict[int, int] = field(repr=False)
    salient: bool

    def __call__(self) -> np.ndarray:
        labels = np.zeros(self.size, np.uint8)
        shapes = [(annotation, self._pixels(annotation)) for annotation in self.annotations]
        for annotation, pixels in sorted(shapes, key=lambda s: (not s[0].get("iscrowd"), -s[1].sum())):
            label = IGNORE if annotation.get("iscrowd") else 1 + self.indices[annotation["category_id"]]
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
            raise ValueError(
                f"{self.source}: annotation {annotation['id']} cannot be read: {type(error).__name__} {error}"
            ) from error
        if pixels.shape != self.size:
            raise ValueError(
                f"{self.source}: annotation {annotation['id']} is {pixels.shape[1]} x {pixels.shape[0]} px, its image "
                f"{self.size[1]} x {self.size[0]}"
            )
        return pixels


class CocoData(DenseData):
    """A data set in COCO's format, as semantic labels (the background and each category) or saliency masks.

    Args:
        root: folder of the data set; may contain environment variables.
        train: JSON file of the training annotations (instances or stuff) below ``root``.
        test: JSON file of the test annotations below ``root``.
        train_images: folder of the training images below ``root``.
        test_images: folder of the test images below ``root``.
        categories: names of the categories to use, in the order of their classes 1, 2, ...; default: all categories in
            the training file, in the order of their ids. All other categories are background.
        target: ``"labels"``, or ``"mask"``: a pixel is salient if it belongs to any instance of the categories.
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
        """The names of the categories to use, in the order of their classes, and the id of each category in a file."""
        listed = sorted(self._open(path).cats.items())
        ids = {category["name"]: i for i, category in listed}
        if len(ids) < len(listed):
            names = [category["name"] for _, category in listed]
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path}: two categories are called {repeated!r}")
        names = list(ids) if self.categories is None else list(self.categories)
        if len(names) >= IGNORE:
            raise ValueError(
                f"{path}: has {len(names)} categories; expected at most {IGNORE - 1}: choose with `categories`"
            )
        return names, ids

    def _load(self, path: Path, images: Path, names: list[str]) -> tuple[list[Sample], list[str]]:
        coco, (_, ids) = self._open(path), self._categories(path)
        for name in names:
            check_name(name, ids, f"category of {path}")
        samples, problems = [], []
        if self.categories is None:
            problems = [f"{path}: the training annotations have no category {n!r}" for n in ids.keys() - set(names)]
        indices = {ids[name]: index for index, name in enumerate(names)}
        for i, image in sorted(coco.imgs.items()):
            missing = [key for key in ("file_name", "height", "width") if key not in image]
            if missing:
                problems.append(f"{path}: image {i} has no {', '.join(missing)}")
                continue
            annotations = coco.imgToAnns.get(i, [])
            source = f"{path} (image {i}, {image['file_name']})"
            problems += [
                f"{source}: annotation {a['id']} has the category {a['category_id']}, which the file does not list"
                for a in annotations
                if a["category_id"] not in coco.cats
            ]
            used = [a for a in annotations if a["category_id"] in indices]
            labels = CocoLabels(source, (image["height"], image["width"]), used, indices, self.key == "mask")
            samples.append(Sample(images / image["file_name"], labels))
        unlisted = sorted({a["image_id"] for a in coco.anns.values()} - set(coco.imgs))
        problems += [f"{path}: annotations of the image {i}, which the file does not list" for i in unlisted]
        if not samples:
            problems.append(f"{path}: has no images")
        return samples, problems

    def _open(self, path: Path) -> Any:
        """A COCO file, read once."""
        from pycocotools.coco import COCO

        if not path.is_file():
            raise ValueError(f"no annotation file {str(path)!r}")
        if path not in self._files:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints how long it took
                try:
                    self._files[path] = COCO(str(path))
                except (ValueError, KeyError, TypeError, AssertionError) as error:
                    raise ValueError(f"{path}: is no COCO file: {type(error).__name__} {error}") from error
        return self._files[path]
