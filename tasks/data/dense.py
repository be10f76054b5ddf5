"""Data modules with a label map per image: transforms, splits, loaders and the check of all files."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from padprobe.network.tap import center_crop
from tasks.data.files import Sample, check_samples, read_image
from tasks.data.order import ShuffleByEpoch, seed_of

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise its import looks for updates on the network

import albumentations as A
import cv2


class DenseDataset(Dataset[dict[str, Any]]):
    """Images and their label maps, augmented and resized together; the aspect ratio is not kept.

    Items are dictionaries: ``image`` float32 (3, S + 2 context, S + 2 context), and the label map of the image's
    central S x S px under ``key``: ``mask`` float32 (1, S, S) in [0, 1], or ``labels`` int64 (S, S).

    The random numbers of ``augment`` depend on seed, epoch and index, so that a resumed training draws the same ones;
    or on torch's random state if no sampler sets ``epoch`` (it is then -1).

    Args:
        samples: files of images and label maps.
        key: ``"mask"`` or ``"labels"``.
        image_size, context, augment, normalize, seed: see :class:`DenseData`.
        blind: whether to leave out the images and return only label maps.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        key: str,
        image_size: int,
        context: int,
        augment: Sequence[A.BasicTransform],
        normalize: bool,
        blind: bool,
        seed: int,
    ) -> None:
        self.samples, self.key, self.image_size, self.blind, self.seed = list(samples), key, image_size, blind, seed
        self.epoch = torch.tensor(-1).share_memory_()
        size = image_size + 2 * context
        nearest = cv2.INTER_NEAREST_EXACT if key == "labels" else cv2.INTER_LINEAR
        scale = A.Normalize() if normalize else A.Normalize((0, 0, 0), (1, 1, 1))  # by default ImageNet's
        self.random = bool(augment)
        self.transform = A.Compose([*augment, A.Resize(size, size, mask_interpolation=nearest), scale])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        label_map = sample.read()
        image = np.zeros((*label_map.shape, 3), np.uint8) if self.blind else read_image(sample.image)
        if self.random:
            epoch = int(self.epoch)
            seed = int(torch.randint(2**31, ())) if epoch < 0 else seed_of(self.seed, epoch, index)
            self.transform.set_random_seed(seed)
        result = self.transform(image=image, mask=label_map)
        labels = center_crop(torch.from_numpy(result["mask"]), (self.image_size, self.image_size))
        item = {self.key: labels.long() if self.key == "labels" else labels[None].float()}
        return item if self.blind else item | {"image": torch.from_numpy(result["image"]).permute(2, 0, 1)}


class DenseData(LightningDataModule, ABC):
    """Training, validation and test images with a label map each. Subclasses define ``samples``, which lists the files.

    Args:
        image_size: S, the side of the labelled area, in pixels.
        context: width in pixels of the margin around the labelled area that the image also shows, for a network with
            ``alignment: context``. It decides which area is labelled: compare networks at the same value.
        batch_size: images per step.
        num_workers: number of processes that read images.
        limit: largest number of images in a split; a larger split is sampled at random.
        augment: albumentations transforms of the training images and their labels, before they are resized. Transforms
            that create new borders (rotations, shifts) fill them with label 0 unless they are given a ``fill_mask``.
        normalize: subtract ImageNet's mean and divide by its standard deviation; if not, values are in [0, 1].
        holdout: share of the training images to validate on, if the data set has no validation images.
        check_files: whether to read every file before training, and refuse to start if one is bad.
        seed: seed of the sampling by ``limit``, the held-out images, the training order and the augmentation. With
            several processes, the last two depend on ``seed_everything`` instead.
    """

    key: str
    labels: tuple[int, int] | None = None
    """The number of classes and the label to ignore, if the data have classes."""

    def __init__(
        self,
        image_size: int = 224,
        context: int = 0,
        batch_size: int = 16,
        num_workers: int = 0,
        limit: int | None = None,
        augment: Sequence[A.BasicTransform] = (),
        normalize: bool = False,
        holdout: float = 0.05,
        check_files: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("image_size", image_size, 1), ("context", context, 0), ("limit", limit, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout is {holdout}; expected a share in (0, 1)")
        self.image_size, self.context, self.normalize, self.augment = image_size, context, normalize, augment
        self.batch_size, self.num_workers, self.limit, self.seed = batch_size, num_workers, limit, seed
        self.holdout, self._check_files = holdout, check_files
        self._splits: dict[str, list[Sample]] = {}

    @abstractmethod
    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        """All samples of ``"train"``, ``"val"`` (may be empty) or ``"test"``, and one line for each problem seen."""

    def check(self) -> list[str]:
        """Reads all files of all splits; one line, which names a path, for each problem."""
        problems: list[str] = []
        images: dict[str, set[Path]] = {}
        for split in ("train", "val", "test"):
            samples, split_problems = self.samples(split)
            problems += split_problems + check_samples(samples)
            images[split] = {sample.image for sample in samples}
        for first, second in itertools.combinations(images, 2):
            if shared := sorted(images[first] & images[second]):
                problems.append(f"{shared[0]}: is in {first} and in {second} ({len(shared)} such images)")
        return list(dict.fromkeys(problems))

    def prepare_data(self) -> None:
        problems = self.check() if self._check_files else []
        if problems:
            more = f"\n... and {len(problems) - 20} more" * (len(problems) > 20)
            raise ValueError(f"{len(problems)} problems with the data:\n" + "\n".join(problems[:20]) + more)
        self._check_files = False  # Lightning calls this before every fit and test

    def split(self, name: str) -> list[Sample]:
        """The samples that ``"train"``, ``"val"`` or ``"test"`` uses, after holding out and sampling."""
        if not self._splits:
            splits = {split: self.samples(split)[0] for split in ("train", "val", "test")}
            if not splits["val"]:
                images = splits["train"]
                order = np.random.default_rng(self.seed).permutation(len(images))
                n = max(1, round(self.holdout * len(order)))
                splits["val"], splits["train"] = ([images[i] for i in sorted(p)] for p in (order[:n], order[n:]))
            for split, samples in splits.items():
                if self.limit is not None and self.limit < len(samples):
                    chosen = np.random.default_rng(self.seed).choice(len(samples), self.limit, replace=False)
                    splits[split] = [samples[i] for i in sorted(chosen)]
            self._splits = splits
        return self._splits[name]

    def dataset(self, split: str, augment: Sequence[A.BasicTransform] = (), blind: bool = False) -> DenseDataset:
        """The images and label maps of a split."""
        options = (self.image_size, self.context, augment, self.normalize, blind, self.seed)
        return DenseDataset(self.split(split), self.key, *options)

    def _loader(self, dataset: DenseDataset, **options: Any) -> DataLoader:
        options |= {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(dataset, self.batch_size, **options)

    def train_dataloader(self) -> DataLoader:
        dataset = self.dataset("train", self.augment)
        if len(dataset) < self.batch_size:
            raise ValueError(f"batch_size is {self.batch_size}, but there are only {len(dataset)} training images")
        return self._loader(dataset, sampler=ShuffleByEpoch(dataset, self.seed), drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.dataset("test"))

    def label_dataloader(self) -> DataLoader:
        """The label maps of the training images, in order, for the position-only baseline."""
        return self._loader(self.dataset("train", blind=True))
