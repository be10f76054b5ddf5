"""One pass of a frozen encoder over images: aligned features, streamed or kept."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from padprobe.network.tap import StageTap, align, center_crop
from padprobe.network.trace import stage_shapes
from padprobe.stimuli import Images, image_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Progress = Callable[[str, int, int], None]
"""Called with (what runs, steps done, steps in all)."""


class FeatureReader:
    """Runs images through an encoder in evaluation mode and hands out its stages, aligned to one grid.

    Features are the channels of f1..fn and, last, the image itself ("rgb"), side by side: ``channels`` gives each
    one's place. In several processes each reads its share of the images. Use it as a context manager: it puts the
    encoder back as it was.

    Args:
        encoder: the network.
        layers: dotted names of the stages f1..fn.
        grid: side of the aligned features in cells.
        image_size: side in pixels of the image that a padded encoder sees.
        shown: side in pixels of the images that are given; what exceeds ``image_size`` is cropped away, around the
            centre.
        sides: where given, the encoder sees all of ``shown``, and its stages are centre-cropped to these sides instead.
        normalize: subtract ImageNet's mean and divide by its standard deviation.
        batch_size: images a batch.
        workers: processes that read images.
        fabric: Lightning's Fabric: the device, and this process's place among all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        layers: Sequence[str],
        grid: int,
        image_size: int,
        shown: int,
        sides: Sequence[int] | None,
        normalize: bool,
        batch_size: int,
        workers: int,
        fabric: Fabric,
    ) -> None:
        self.encoder, self.grid, self.image_size, self.shown, self.sides = encoder, grid, image_size, shown, sides
        self.batch_size, self.workers, self.fabric = batch_size, workers, fabric
        widths = [c for c, _, _ in stage_shapes(encoder, layers, shown if sides else image_size)]
        ends = torch.tensor([*widths, 3]).cumsum(0).tolist()
        names = [*(f"f{i + 1}" for i in range(len(layers))), "rgb"]
        self.channels = {
            name: slice(end - width, end) for name, width, end in zip(names, [*widths, 3], ends, strict=True)
        }
        self.device = fabric.device
        self.mean = torch.tensor(IMAGENET_MEAN if normalize else (0.0,) * 3, device=self.device)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD if normalize else (1.0,) * 3, device=self.device)[:, None, None]
        self.layers = list(layers)

    def __enter__(self) -> FeatureReader:
        self.home = next((p.device for p in self.encoder.parameters()), self.device)
        self.dtype = next((p.dtype for p in self.encoder.parameters() if p.is_floating_point()), torch.float32)
        self.modes = {module: module.training for module in self.encoder.modules()}
        self.encoder.eval().to(self.device)
        self.tap = StageTap(self.encoder, self.layers, self.grid, self.sides)
        return self

    def __exit__(self, *args: Any) -> None:
        self.tap.remove()
        self.encoder.to(self.home)
        for module, mode in self.modes.items():
            module.training = mode

    @property
    def width(self) -> int:
        """Channels in all, the image's three included."""
        return self.channels["rgb"].stop

    def batches(self, images: Images, what: str, progress: Progress | None) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the images: their places in ``images``, (B,), and features (B, width, grid, grid)."""
        world = self.fabric.world_size
        share = range(self.fabric.global_rank, len(images), world)
        loader: DataLoader[Tensor] = DataLoader(
            images if world == 1 else Subset(images, share),  # type: ignore[arg-type]
            self.batch_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_stack,
        )
        done = 0
        for batch in loader:
            yield torch.tensor(share[done : done + len(batch)]), self.features(batch)
            done += len(batch)
            if progress:
                progress(what, min(done * world, len(images)), len(images))

    def settle(self, images: Images) -> None:
        """Gives an untrained encoder's BatchNorms the statistics of a batch of images, which they would have from the
        first step of a training on. With those that they start with, a deep residual network's features explode."""
        norms = [m for m in self.encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the batch's statistics, whole
            norm.train()
        if norms:
            self.features(_stack([images[i] for i in range(min(self.batch_size, len(images)))]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Aligned features of a batch of images: (B, 3, shown, shown) -> (B, width, grid, grid), float32."""
        if images.shape[1:] != (3, self.shown, self.shown):
            raise ValueError(
                f"an image has shape {tuple(images.shape[1:])}; expected (3, {self.shown}, {self.shown}) for "
                f"image_size {self.image_size}" + (" with its context" if self.shown > self.image_size else "")
            )
        images = images.to(self.device, non_blocking=True)
        center = center_crop(images, self.image_size)
        seen = ((images if self.sides else center) - self.mean) / self.std
        self.encoder(seen.to(self.dtype).contiguous(memory_format=torch.channels_last))
        return self.tap.take(align(center, self.grid))


def _stack(items: list[Any]) -> Tensor:
    return torch.stack([image_of(item) for item in items])


class FeatureCache:
    """Features of n images in half precision: in memory or, above a budget, in a memory-mapped file.

    The file has no name from the start, so that nothing is left of it whatever ends the process.

    Args:
        n: number of images.
        width: channels.
        grid: side of the features in cells.
        budget: gigabytes (10^9 bytes) of memory, of the device's where it is a GPU.
        folder: of the file; default: the system's folder for temporary files.
        device: where features in memory lie.

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
        """How large it is and where it lies, in words."""
        return f"{self.gb:.1f} GB {'on disk' if self._file else 'in memory'}"

    def write(self, index: Tensor, features: Tensor) -> None:
        """Keeps the features of the images at these places."""
        half = features.half()
        self._finite &= half.isfinite().all()
        for i, row in zip(index.tolist(), half, strict=True):
            self.values[i] = row
        self._release()

    def check(self, fabric: Fabric) -> None:
        """Raises ValueError, in every process, where something that was written is not finite in half precision."""
        finite = torch.as_tensor(fabric.all_reduce(self._finite.int(), reduce_op="min"))
        if not finite:
            raise ValueError(
                "the encoder's features leave the range of half precision or are not finite: normalise its input "
                "(normalize=True), or check its weights"
            )

    def read(self, index: Tensor, out: Tensor) -> Tensor:
        """The features at these places, (B, width, grid, grid), as float32 in ``out``, which holds B or more."""
        batch = out[: len(index)]
        if batch.device.type == "cpu":
            for row, i in zip(batch, index.tolist(), strict=True):
                row.copy_(self.values[i])
            self._release()
        elif self.values.device.type == "cpu":  # half precision travels: it is half the way
            batch.copy_(torch.stack([self.values[i] for i in index.tolist()]).to(batch.device))
            self._release()
        else:
            batch.copy_(self.values[index.to(self.values.device)])
        return batch

    def buffer(self, batch_size: int, device: torch.device) -> Tensor:
        """What :meth:`read` writes to. One for all batches: a fresh 150 MB block costs more in page faults than the
        arithmetic on it."""
        return torch.empty(batch_size, *self.values.shape[1:], device=device)

    def _release(self) -> None:
        """Lets go of the file's pages, which would count as this process's memory until the system wants them back."""
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)


def _reserve(file: int, size: int, folder: str | Path) -> None:
    """Makes room for a file now: a memory-mapped one that runs out of disk kills the process."""
    if not hasattr(os, "posix_fallocate"):
        os.truncate(file, size)
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise ValueError(
            f"the features need {size / 1e9:.1f} GB in {str(folder)!r}, which has "
            f"{shutil.disk_usage(folder).free / 1e9:.1f} GB: raise cache_gb, or name another folder"
        ) from error


def gather(share: FeatureCache, whole: FeatureCache | None, fabric: Fabric, batch_size: int = 32) -> None:
    """Collects every process's share of the images, dealt out as by :meth:`FeatureReader.batches`, on process 0.

    Args:
        share: this process's images, in their order.
        whole: of all images; on process 0 alone.
        fabric: as the reader's.
        batch_size: images that each process sends at a time.
    """
    world = fabric.world_size
    longest = fabric.broadcast(len(share))  # process 0 has the first image over
    block = torch.zeros(batch_size, *share.values.shape[1:], dtype=torch.float16, device=fabric.device)
    for start in range(0, longest, batch_size):
        own = share.values[start : start + batch_size]
        block[: len(own)] = own
        for rank, received in enumerate(fabric.all_gather(block)):
            if whole is not None:
                index = torch.arange(start, start + batch_size) * world + rank
                index = index[index < len(whole)]
                whole.write(index, received[: len(index)])
