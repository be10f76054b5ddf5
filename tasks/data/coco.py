"""Data sets in COCO's format, as semantic labels or saliency masks."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO

from padprobe.errors import check_name
from tasks.data.dense import DenseData
from tasks.data.files import Sample, find_folder

IGNORE = 255


def draw_labels(
    source: str, size: tuple[int, int], annotations: list[dict[str, Any]], labels: dict[int, int], salient: bool
) -> np.ndarray:
    """The annotations of one image as a label map.

    Semantic: (H, W) uint8, 0 for the background. Where instances overlap, the smaller one is on top. Pixels of a crowd
    that nothing else covers are 255, to be ignored. Saliency: (H, W) float32, 1 on all instances and crowds.

    Args:
        source: names the file and the image in messages.
        size: (H, W).
        annotations: COCO's annotations of the image, of the categories in ``labels``.
        labels: label of each category, by its COCO id.
        salient: whether to return a saliency mask.

    Raises:
        ValueError: for an annotation that cannot be read, or whose size is not the image's.
    """
    drawn = np.zeros(size, np.uint8)
    shapes = [(bool(a.get("iscrowd")), labels[a["category_id"]], _pixels(source, size, a)) for a in annotations]
    for crowd, label, pixels in sorted(shapes, key=lambda shape: (not shape[0], -shape[2].sum())):
        drawn[pixels] = IGNORE if crowd else label
    return (drawn > 0).astype(np.float32) if salient else drawn


def _pixels(source: str, size: tuple[int, int], annotation: dict[str, Any]) -> np.ndarray:
    """The pixels of an annotation: (H, W) bool."""
    try:
        shape = annotation["segmentation"]
        if isinstance(shape, list):
            shape = mask.merge(mask.frPyObjects(shape, *size))
        elif isinstance(shape["counts"], list):
            shape = mask.frPyObjects(shape, *size)
        pixels = mask.decode(shape).astype(bool)
    except Exception as error:  # pycocotools raises bare Exceptions
        what = f"{type(error).__name__} {error}"
        raise ValueError(f"{source}: annotation {annotation['id']} cannot be read: {what}") from error
    if pixels.shape != size:
        (h, w), (height, width) = pixels.shape, size
        raise ValueError(f"{source}: annotation {annotation['id']} is {w} x {h} px, its image {width} x {height}")
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
        self._opened: dict[Path, Any] = {}

    @property
    def labels(self) -> tuple[int, int] | None:  # type: ignore[override]
        return None if self.key == "mask" else (1 + len(self._names()), IGNORE)

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        if split == "val":
            return [], []
        path, images = (find_folder(self.root) / part for part in self.files[split])
        coco, ids, names = self._open(path), self._ids(path), self._names()
        for name in names:
            check_name(name, ids, f"category of {path}")
        labels = {ids[name]: label for label, name in enumerate(names, 1)}
        samples, problems = [], []
        if self.categories is None:
            problems = [f"{path}: the training annotations have no category {n!r}" for n in ids.keys() - set(names)]
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
            used = [a for a in annotations if a["category_id"] in labels]
            size = image["height"], image["width"]
            read = partial(draw_labels, source, size, used, labels, self.key == "mask")
            samples.append(Sample(images / image["file_name"], read))
        unlisted = sorted({a["image_id"] for a in coco.anns.values()} - set(coco.imgs))
        problems += [f"{path}: annotations of the image {i}, which the file does not list" for i in unlisted]
        if not samples:
            problems.append(f"{path}: has no images")
        return samples, problems

    def _names(self) -> list[str]:
        """The names of the categories to use, in the order of their classes."""
        path = find_folder(self.root) / self.files["train"][0]
        names = list(self._ids(path) if self.categories is None else self.categories)
        if len(names) >= IGNORE:
            raise ValueError(
                f"{path}: has {len(names)} categories; expected at most {IGNORE - 1}: choose with `categories`"
            )
        return names

    def _ids(self, path: Path) -> dict[str, int]:
        """The id of each category in a file, in the order of the ids."""
        names = [category["name"] for _, category in sorted(self._open(path).cats.items())]
        name, count = Counter(names).most_common(1)[0] if names else ("", 0)
        if count > 1:
            raise ValueError(f"{path}: two categories are called {name!r}")
        return dict(zip(names, sorted(self._open(path).cats), strict=True))

    def _open(self, path: Path) -> Any:
        """A COCO file, read once."""
        if not path.is_file():
            raise ValueError(f"no annotation file {str(path)!r}")
        if path not in self._opened:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints how long it took
                try:
                    self._opened[path] = COCO(str(path))
                except (ValueError, KeyError, TypeError, AssertionError) as error:
                    raise ValueError(f"{path}: is no COCO file: {type(error).__name__} {error}") from error
        return self._opened[path]
