"""Saliency data sets: folders of images and masks, in the layouts in which they are published."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from padprobe.errors import check_name
from tasks.data.dense import DenseData
from tasks.data.files import Masks, Sample, find_folder, pair, read_saliency

LAYOUTS = {  # folders of images and of masks; MSRA (10K, B) has JPEG images and PNG masks in one folder
    "plain": ("images", "masks"),
    "DUTS-TR": ("DUTS-TR-Image", "DUTS-TR-Mask"),
    "DUTS-TE": ("DUTS-TE-Image", "DUTS-TE-Mask"),
    "ECSSD": ("images", "ground_truth_mask"),
    "PASCAL-S": ("datasets/imgs/pascal", "datasets/masks/pascal"),
    "DUT-OMRON": ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
    "MSRA": ("Imgs", "Imgs"),
}


@dataclass
class SaliencyFolder:
    """One saliency data set.

    Attributes:
        root: folder of the data set; may contain environment variables.
        layout: ``plain`` (``images/`` and ``masks/``) or the layout of a published data set: ``DUTS-TR``, ``DUTS-TE``,
            ``ECSSD``, ``PASCAL-S``, ``DUT-OMRON``, ``MSRA``.
        masks: ``binary``: any other value than 0 and 255 is an error. ``threshold``: values over half of the range are
            salient. ``graded``: the loss takes the values as they are; scores take those over one half as salient.
    """

    root: str
    layout: str = "plain"
    masks: Masks = "binary"

    def samples(self) -> tuple[list[Sample], list[str]]:
        check_name(self.layout, LAYOUTS, "layout")
        root = find_folder(self.root)
        images, masks = LAYOUTS[self.layout]
        return pair(root / images, root / masks, partial(read_saliency, masks=self.masks))


class SaliencyData(DenseData):
    """Images and saliency masks, to train on one data set and test on another (paper, table 5a).

    Args:
        train: training data set.
        test: test data set.
        val: validation data set; default: images held out from ``train``.
        options: see :class:`~tasks.data.dense.DenseData`.
    """

    key = "mask"

    def __init__(
        self, train: SaliencyFolder, test: SaliencyFolder, val: SaliencyFolder | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.folders = {"train": train, "val": val, "test": test}

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        folder = self.folders[split]
        return folder.samples() if folder else ([], [])
