"""A frozen encoder's pass over images: its aligned features, batch by batch or all in a cache."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from padprobe.network.tap import StageTap, align, center_crop
from padprobe.probe.plan import Plan
from padprobe.stimuli import Images, image_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Progress = Callable[[str, int, int], None]
"""Called with (what runs, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """The progress function that shows nothing."""


class FeatureReader:
    """Runs images through an encoder in evaluation mode and hands out its stages, aligned to one grid.

    Features are the channels of f1..fn and, last, the image itself ("rgb"), side by side, see ``plan.channels``. With
    several processes, each reads its share of the images. Use it as a context manager: it leaves the encoder as it was.
    """

    def __init__(self, encoder: nn.Module, plan: Plan, fabric: Fabric, progress: Progress = silent) -> None:
        self.encoder, self.plan, self.fabric, self.device = encoder, plan, fabric, fabric.device
        self.progress = progress
        normalize = plan.options.normalize
        self.mean = torch.tensor(IMAGENET_MEAN if normalize else (0.0,) * 3, device=self.device)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD if normalize else (1.0,) * 3, device=self.device)[:, None, None]

    def __enter__(self) -> FeatureReader:
        self.home = next((p.device for p in self.encoder.parameters()), self.device)
        self.dtype = next((p.dtype for p in self.encoder.parameters() if p.is_floating_point()), torch.float32)
        self.modes = {module: module.training for module in self.encoder.modules()}
        self.encoder.eval().to(self.device)
        sides = self.plan.sides if self.plan.unpadded else None
        self.tap = StageTap(self.encoder, self.plan.layers, self.plan.options.grid, sides, self.plan.layouts)
        return self

    def __exit__(self, *args: Any) -> None:
        self.tap.remove()
        self.encoder.to(self.home)
        for module, mode in self.modes.items():
            module.training = mode

    def batches(self, images: Images, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this process's share of the images: their places in ``images``, (B,), and their features.

        ``what`` names this work in the progress display.
        """
        world = self.fabric.world_size
        share = range(self.fabric.global_rank, len(images), world)
        loader: DataLoader[Tensor] = DataLoader(
            images if world == 1 else Subset(images, share),  # type: ignore[arg-type]
            self.plan.options.batch_size,
            num_workers=self.plan.options.num_workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_stack,
        )
        done = 0
        for batch in loader:
            yield torch.tensor(share[done : done + len(batch)]), self.features(batch)
            done += len(batch)
            self.progress(what, min(done * world, len(images)), len(images))

    def settle(self, images: Images) -> None:
        """Gives an untrained encoder's BatchNorms the statistics of the first batch of images, as a training would.

        With their initial statistics, the features of a deep residual network explode.
        """
        norms = [m for m in self.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the statistics of this batch alone
            norm.train()
        if norms:
            batch = range(min(self.plan.options.batch_size, len(images)))
            self.features(_stack([images[i] for i in batch]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Aligned features of a batch of images: (B, 3, *source_px) -> (B, width, grid, grid), float32."""
        self.plan.check_shape(images.shape[1:])
        images = images.to(self.device, non_blocking=True)
        center = center_crop(images, self.plan.size)
        seen = ((images if self.plan.unpadded else center) - self.mean) / self.std
        self.encoder(seen.to(self.dtype).contiguous(memory_format=torch.channels_last))
        return self.tap.take(align(center, self.plan.options.grid))


def _stack(items: list[Any]) -> Tensor:
    return torch.stack([image_of(item) for item in items])


class FeatureCache:
    """Features of n images in half precision: in memory or, above a budget, in a memory-mapped file.

    The file is unlinked as soon as it is open, so that it disappears however the process ends.

    Args:
        n, width, grid: images, channels, and the side of the features in cells.
        budget: memory in gigabytes (10^9 bytes); on a GPU, the GPU's memory.
        folder: of the file; default: the system's folder for temporary files.
        device: where features in memory are kept.

    Raises:
        ValueError: where the file would not fit on the disk.
    """

    def __init__(
        self, n: int, width: int, grid: int, budget: float, folder: str | Path | None, device: torch.device
    ) -> None:
        shape = (n, width, grid, grid)
        self.gb = 2 * n * width * grid**2 / 1e9
        self._file: mmap.mmap | None = None
        if self.gb > budget:
            with tempfile.TemporaryFile(dir=folder, prefix="padprobe-") as file:
                _reserve(file.fileno(), 2 * n * width * grid**2, folder or tempfile.gettempdir())
                self._file = mmap.mmap(file.fileno(), 0)
            self.values = torch.frombuffer(self._file, dtype=torch.float16).view(shape)
        else:
            self.values = torch.empty(shape, dtype=torch.float16, device=device)
        self._finite = torch.tensor(True, device=device)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def where(self) -> str:
        """Its size and place, in words."""
        return f"{self.gb:.1f} GB {'on disk' if self._file else 'in memory'}"

    def write(self, index: Tensor, features: Tensor) -> None:
        """Keeps the features (B, width, grid, grid) of the images with these numbers, (B,)."""
        half = features.half()
        self._finite &= half.isfinite().all()
        for i, row in zip(index.tolist(), half, strict=True):
            self.values[i] = row
        self._release()

    def check(self, fabric: Fabric) -> None:
        """Raises ValueError, in every process, where a feature is not finite in half precision."""
        if not torch.as_tensor(fabric.all_reduce(self._finite.int(), reduce_op="min")):
            raise ValueError(
                "some features of the encoder are not finite in half precision, whose range ends at 65,504: normalize "
                "the images (normalize=True), settle an untrained encoder (settle=True), or check the weights"
            )

    def read(self, index: Tensor, out: Tensor) -> Tensor:
        """Copies the features of B images into ``out``, which has room for B or more: (B, width, grid, grid)."""
        batch = out[: len(index)]
        if batch.device.type == "cpu":
            for row, i in zip(batch, index.tolist(), strict=True):
                row.copy_(self.values[i])
        elif self.values.device.type == "cpu":  # half precision is half as much to copy to the GPU
            batch.copy_(torch.stack([self.values[i] for i in index.tolist()]).to(batch.device))
        else:
            batch.copy_(self.values[index.to(self.values.device)])
        self._release()
        return batch

    def buffer(self, batch_size: int, device: torch.device) -> Tensor:
        """Memory for :meth:`read`. Use one for all batches: allocating 150 MB anew takes longer than the arithmetic."""
        return torch.empty(batch_size, *self.values.shape[1:], device=device)

    def _release(self) -> None:
        """Gives the file's pages back to the system: they would count as this process's memory."""
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)


def _reserve(file: int, size: int, folder: str | Path) -> None:
    """Reserves a file's disk space now: a memory-mapped file on a full disk kills the process."""
    if not hasattr(os, "posix_fallocate"):
        os.truncate(file, size)
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise ValueError(
            f"the features need {size / 1e9:.1f} GB in {str(folder)!r}, which has "
            f"{shutil.disk_usage(folder).free / 1e9:.1f} GB: raise cache_gb, or give another cache_dir"
        ) from error


def gather(share: FeatureCache, whole: FeatureCache | None, fabric: Fabric) -> None:
    """Collects the shares of all processes, as :meth:`FeatureReader.batches` deals them out, on process 0.

    ``share`` holds this process's images, and ``whole``, on process 0 only, has room for all.
    """
    world, batch_size = fabric.world_size, 32
    longest = fabric.broadcast(len(share))  # process 0 has one image more where the shares differ
    block = torch.zeros(batch_size, *share.values.shape[1:], dtype=torch.float16, device=fabric.device)
    for start in range(0, longest, batch_size):
        rows = share.values[start : start + batch_size]
        block[: len(rows)] = rows
        for rank, received in enumerate(fabric.all_gather(block)):
            if whole is not None:
                index = torch.arange(start, start + batch_size) * world + rank
                index = index[index < len(whole)]
                whole.write(index, received[: len(index)])
