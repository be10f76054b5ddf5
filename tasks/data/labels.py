"""Semantic segmentation data with labels in image files: folders, such as CamVid's, and PASCAL VOC."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torchvision.datasets import VOCSegmentation

from tasks.data.dense import DenseData
from tasks.data.files import Sample, find_folder, pair, read_labels


class LabelFolders(DenseData):
    """Folders of images and of label maps (8-bit grey or palette images of class numbers), two folders per split.

    Args:
        root: folder of the data set; may contain environment variables.
        classes: names of the classes, in the order of their labels 0, 1, ...
        ignore_index: value of pixels without a label.
        images: folder of images below ``root``, with ``{split}`` in place of train, val, test.
        masks: folder of label maps, in the same form.
        has_val: whether the data set has a split ``val``; if not, images of ``train`` are held out.
        options: see :class:`~tasks.data.dense.DenseData`.
    """

    key = "labels"

    def __init__(
        self,
        root: str,
        classes: list[str],
        ignore_index: int = 255,
        images: str = "images/{split}",
        masks: str = "masks/{split}",
        has_val: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root, self.images, self.masks, self.has_val = root, images, masks, has_val
        self.labels = len(classes), ignore_index
        self.read = partial(read_labels, classes=len(classes), ignore_index=ignore_index)

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        if split == "val" and not self.has_val:
            return [], []
        images, masks = (find_folder(self.root) / folder.format(split=split) for folder in (self.images, self.masks))
        return pair(images, masks, self.read)


class VOCData(DenseData):
    """PASCAL VOC segmentation: 20 classes and the background; the border of objects (255) is ignored.

    Trains on ``train`` and tests on ``val``, as the paper does (VOC's test labels are not public). Validates on images
    held out from ``train``.

    Args:
        root: folder that contains ``VOCdevkit``; may contain environment variables.
        year: year of the challenge.
        download: download the data into ``root`` if they are missing.
        options: see :class:`~tasks.data.dense.DenseData`.
    """

    key = "labels"
    labels = 21, 255

    def __init__(self, root: str, year: str = "2012", download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.root, self.year, self.download = root, year, download

    def prepare_data(self) -> None:
        if self.download:
            root = find_folder(self.root, make=True)
            if not (root / "VOCdevkit" / f"VOC{self.year}" / "SegmentationClass").is_dir():
                VOCSegmentation(str(root), self.year, "train", download=True)
        super().prepare_data()

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        if split == "val":
            return [], []
        root = find_folder(self.root)
        try:
            voc = VOCSegmentation(str(root), self.year, "train" if split == "train" else "val")
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(f"no VOC {self.year} in {str(root)!r}: {error} (or set download: true)") from error
        files = zip(voc.images, voc.masks, strict=True)
        return [Sample(Path(image), partial(read_labels, Path(mask), *self.labels)) for image, mask in files], []
