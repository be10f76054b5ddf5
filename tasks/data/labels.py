"""Semantic labels in image files: folders such as CamVid's, and PASCAL VOC."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tasks.data.dense import DenseData
from tasks.data.files import LabelFile, Sample, find_folder, pair


class LabelFolders(DenseData):
    """Folders of images and label maps (8-bit grey or palette, the class of every pixel), a pair for each split.

    Args:
        root: the data set's folder; environment variables are filled in.
        classes: names of the classes, in the order of their labels 0, 1, ...
        ignore_index: label of pixels that have none.
        images: folder of images below ``root``, with ``{split}`` for train, val, test.
        masks: folder of label maps, likewise.
        has_val: whether there is a folder for validation; else images of ``train`` are held out.
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
        self.labels = self.classes, self.ignored = len(classes), ignore_index

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        if split == "val" and not self.has_val:
            return [], []
        root = find_folder(self.root)
        read = partial(LabelFile, classes=self.classes, ignore_index=self.ignored)
        return pair(root / self.images.format(split=split), root / self.masks.format(split=split), read)


class VOCData(DenseData):
    """PASCAL VOC segmentation: 20 classes and the background; the border of objects (255) is ignored.

    Trains on ``train``, tests on ``val`` (the paper's split; VOC's own test labels are not public) and validates on
    images held out from ``train``.

    Args:
        root: folder that holds ``VOCdevkit``; environment variables are filled in.
        year: of the challenge.
        download: whether to fetch the data into ``root`` first.
        options: see :class:`~tasks.data.dense.DenseData`.
    """

    key = "labels"
    labels = 21, 255

    def __init__(self, root: str, year: str = "2012", download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.root, self.year, self.download = root, year, download

    def prepare_data(self) -> None:
        if self.download:
            from torchvision.datasets import VOCSegmentation

            root = find_folder(self.root, make=True)
            if not (root / "VOCdevkit" / f"VOC{self.year}" / "SegmentationClass").is_dir():
                VOCSegmentation(str(root), self.year, "train", download=True)
        super().prepare_data()

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        if split == "val":
            return [], []
        from torchvision.datasets import VOCSegmentation

        root = find_folder(self.root)
        try:
            found = VOCSegmentation(str(root), self.year, "train" if split == "train" else "val")
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(f"no VOC {self.year} in {str(root)!r}: {error} (or say download: true)") from error
        read = partial(LabelFile, classes=21, ignore_index=255)
        return [
            Sample(Path(image), read(Path(mask))) for image, mask in zip(found.images, found.masks, strict=True)
        ], []
