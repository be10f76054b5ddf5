"""What the data modules share whose images have a map of labels each: transforms, splits, loaders, the check."""

from __future__ import annotations

import os
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

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version

import albumentations as A
import cv2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class DenseDataset(Dataset[dict[str, Any]]):
    """Images with a map of labels each, resized (squashed) and augmented together.

    Items are dictionaries: ``image`` float32 (3, S + 2 context, ...), and the label map under ``key``: ``mask`` float32
    (1, S, S) in [0, 1], or ``labels`` int64 (S, S), of the image's central S x S px.

    Args:
        samples: where images and label maps come from.
        key: ``"mask"`` or ``"labels"``.
        image_size: S in pixels.
        context: pixels that the image shows beyond each side of what is labelled.
        augment: albumentations transforms, drawn anew for every item: from seed, epoch and index, so that a resumed
            training draws what it would have drawn; from torch's random state where nobody sets ``epoch`` (it is -1).
        normalize: whether to subtract ImageNet's mean and divide by its standard deviation; else in [0, 1].
        blind: leave the images out: label maps alone.
        seed: of the augmentation.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        key: str,
        image_size: int,
        context: int = 0,
        augment: Sequence[A.BasicTransform] = (),
        normalize: bool = False,
        blind: bool = False,
        seed: int = 0,
    ) -> None:
        self.samples, self.key, self.image_size, self.blind, self.seed = list(samples), key, image_size, blind, seed
        self.epoch = torch.tensor(-1).share_memory_()
        size = image_size + 2 * context
        nearest = cv2.INTER_NEAREST_EXACT if key == "labels" else cv2.INTER_LINEAR
        mean, std = (MEAN, STD) if normalize else ((0, 0, 0), (1, 1, 1))
        self.random = bool(augment)
        self.transform = A.Compose(
            [*augment, A.Resize(size, size, mask_interpolation=nearest), A.Normalize(mean, std, max_pixel_value=255)]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        truth = sample.read()
        image = np.zeros((*truth.shape, 3), np.uint8) if self.blind else read_image(sample.image)
        if self.random:
            epoch = int(self.epoch)
            drawn = int(torch.randint(2**31, ())) if epoch < 0 else seed_of(self.seed, epoch, index)
            self.transform.set_random_seed(drawn)
        done = self.transform(image=image, mask=truth)
        labels = center_crop(torch.from_numpy(done["mask"]), self.image_size)
        item = {self.key: labels.long() if self.key == "labels" else labels[None].float()}
        return item if self.blind else item | {"image": torch.from_numpy(done["image"]).permute(2, 0, 1)}


class DenseData(LightningDataModule):
    """Training, validation and test images with a map of labels each. Subclasses say where they are: ``samples``.

    Args:
        image_size: S, the side of what is labelled, in pixels.
        context: pixels that the image shows beyond each side of what is labelled, for a network with ``alignment:
            context``. All networks that are compared should have the same: it decides what is labelled.
        batch_size: images a step.
        num_workers: processes that read images.
        limit: at most so many images of each split, a random sample.
        augment: albumentations transforms of the training images and their labels, before they are resized. Those that
            make new borders (rotations, shifts) fill them with label 0 unless they are told another ``fill_mask``.
        normalize: whether to subtract ImageNet's mean and divide by its standard deviation; else in [0, 1].
        holdout: share of the training images to validate on, where the data set has no validation images of its own.
        check_files: whether to read every file before training, and refuse to start if one is bad.
        seed: of samples, held-out images, training order and augmentation (of several processes: the last two are
            ``seed_everything``'s).
    """

    key: str
    labels: tuple[int, int] | None = None
    """The number of classes and the label to ignore, where the data have classes."""

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
        for name, value, least in (
            ("image_size", image_size, 1),
            ("context", context, 0),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")
        if not 0 < holdout < 1 or (limit is not None and limit < 1):
            raise ValueError(f"holdout is {holdout} and limit {limit}; expected a share in (0, 1) and 1 or more images")
        self.image_size, self.context, self.normalize, self.augment = image_size, context, normalize, augment
        self.batch_size, self.num_workers, self.limit, self.seed = batch_size, num_workers, limit, seed
        self.holdout, self._unchecked = holdout, check_files
        self._splits: dict[str, list[Sample]] = {}

    def samples(self, split: str) -> tuple[list[Sample], list[str]]:
        """All samples of ``"train"``, ``"val"`` (may be none) or ``"test"``, and a line for every problem seen."""
        raise NotImplementedError

    def check(self) -> list[str]:
        """A line, which names a path, for everything that is wrong with any file of any split; reads them all."""
        problems: list[str] = []
        found: dict[str, set[Path]] = {}
        for split in ("train", "val", "test"):
            samples, wrong = self.samples(split)
            problems += wrong + check_samples(samples)
            for other, images in found.items():
                if both := sorted(images & {sample.image for sample in samples}):
                    problems.append(f"{both[0]}: is in {other} and in {split}, as {len(both)} images are")
            found[split] = {sample.image for sample in samples}
        return list(dict.fromkeys(problems))

    def prepare_data(self) -> None:
        problems = self.check() if self._unchecked else []
        if problems:
            more = f"\n... and {len(problems) - 20} more" * (len(problems) > 20)
            raise ValueError(f"{len(problems)} problems with the data:\n" + "\n".join(problems[:20]) + more)
        self._unchecked = False

    def split(self, name: str) -> list[Sample]:
        """The samples to use of ``"train"``, ``"val"`` or ``"test"``."""
        if not self._splits:
            found = {split: self.samples(split)[0] for split in ("train", "val", "test")}
            if not found["val"]:
                order = np.random.default_rng(self.seed).permutation(len(found["train"]))
                held = set(order[: max(1, round(self.holdout * len(order)))].tolist())
                found["val"] = [sample for i, sample in enumerate(found["train"]) if i in held]
                found["train"] = [sample for i, sample in enumerate(found["train"]) if i not in held]
            for split, samples in found.items():
                if self.limit is not None and self.limit < len(samples):
                    chosen = np.random.default_rng(self.seed).choice(len(samples), self.limit, replace=False)
                    found[split] = [samples[i] for i in sorted(chosen)]
            self._splits = found
        return self._splits[name]

    def dataset(self, split: str, augment: Sequence[A.BasicTransform] = (), blind: bool = False) -> DenseDataset:
        """A split's images and label maps."""
        options = (self.image_size, self.context, augment, self.normalize, blind, self.seed)
        return DenseDataset(self.split(split), self.key, *options)

    def _loader(self, dataset: DenseDataset, **options: Any) -> DataLoader:
        persistent = self.num_workers > 0
        return DataLoader(
            dataset, self.batch_size, num_workers=self.num_workers, persistent_workers=persistent, **options
        )

    def train_dataloader(self) -> DataLoader:
        dataset = self.dataset("train", self.augment)
        if len(dataset) < self.batch_size:
            raise ValueError(f"batch_size is {self.batch_size}, and there are {len(dataset)} images to train on")
        return self._loader(dataset, sampler=ShuffleByEpoch(dataset, self.seed), drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.dataset("test"))

    def label_dataloader(self) -> DataLoader:
        """The training images' label maps alone, in order: what position alone can know."""
        return self._loader(self.dataset("train", blind=True))
