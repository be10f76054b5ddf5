"""Saliency data sets: folders of images and masks, as they are distributed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from padprobe.errors import check_name
from tasks.data.dense import DenseData
from tasks.data.files import Masks, SaliencyFile, Sample, find_folder, pair

LAYOUTS = {
    "plain": ("images", "masks"),
    "DUTS-TR": ("DUTS-TR-Image", "DUTS-TR-Mask"),
    "DUTS-TE": ("DUTS-TE-Image", "DUTS-TE-Mask"),
    "ECSSD": ("images", "ground_truth_mask"),
    "PASCAL-S": ("datasets/imgs/pascal", "datasets/masks/pascal"),
    "DUT-OMRON": ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
    "MSRA": ("Imgs", "Imgs"),
}
"""Folders of images and masks below a data set's own; MSRA (10K, B) has JPEG images and PNG masks in one."""


@dataclass
class SaliencyFolder:
    """One data set.

    Attributes:
        root: its folder; environment variables are filled in.
        layout: ``plain`` (``images/`` and ``masks/``) or that of a published set: ``DUTS-TR``, ``DUTS-TE``, ``ECSSD``,
            ``PASCAL-S``, ``DUT-OMRON``, ``MSRA``.
        masks: ``binary``: other values than 0 and 255 are an error. ``threshold``: salient where over one half.
            ``graded``: as they are; scores take what is over one half as salient.
    """

    root: str
    layout: str = "plain"
    masks: Masks = "binary"

    def samples(self) -> tuple[list[Sample], list[str]]:
        check_name(self.layout, LAYOUTS, "layout")
        root = find_folder(self.root)
        images, masks = LAYOUTS[self.layout]
        return pair(root / images, root / masks, partial(SaliencyFile, masks=self.masks), images == masks)


class SaliencyData(DenseData):
    """Images and saliency masks, to train on one data set and test on another (paper, table 5a).

    Args:
        train: data set to train on.
        test: data set to test on.
        val: data set to validate on; default: images held out from ``train``.
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
