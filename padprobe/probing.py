"""Probes a frozen encoder: one pass over the images, every readout at once (paper, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from padprobe.encoders import load_encoder
from padprobe.maps import TARGETS
from padprobe.padding import list_padding
from padprobe.readout.posenet import PosENet, make_optimizer
from padprobe.results import COLUMNS, Results
from padprobe.scores import PositionScores, summarize
from padprobe.stages import StageTap, align, find_stages, stage_shapes
from padprobe.stimuli import Images, image_of, load_images

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Source = str | Path | Images
Progress = Callable[[str, int, int], None]
"""Called with (what runs, steps done, steps in all)."""


def probe_encoder(
    encoder: nn.Module | str | Path,
    train: Source = "dead_leaves",
    test: dict[str, Source] | None = None,
    *,
    stages: str | Sequence[str] = "auto",
    targets: Sequence[str] = TARGETS,
    kernel_size: int = 3,
    depth: int = 1,
    padding: int = 0,
    grid: int = 28,
    image_size: int = 224,
    normalize: bool = False,
    epochs: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    num_workers: int = 0,
    device: str = "auto",
    labels: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Measures how much absolute position a frozen encoder encodes.

    The encoder sees each training image once; its stages, aligned to one grid, are kept in half precision, and one
    readout a target is trained on them (and, as a control, one on the RGB image alone: the paper's "PosENet" row). Then
    it sees each test image once. Neither its weights nor its buffers change.

    Args:
        encoder: a network that takes images (B, 3, S, S), or a name for :func:`~padprobe.load_encoder`.
        train: images to train the readouts on: a folder, a data set or a stimulus, see
            :func:`~padprobe.stimuli.load_images`.
        test: images to score on, by name; ``black``, ``white`` and ``noise`` are the paper's. Default: those and other
            dead leaves.
        stages: dotted layer names, or ``"auto"``: :func:`~padprobe.find_stages`.
        targets: position maps, out of ``H, V, G, HS, VS``.
        kernel_size, depth, padding: of the readout, see :class:`~padprobe.PosENet`.
        grid: side of the aligned features in cells.
        image_size: S in pixels; predictions are scored at this size.
        normalize: subtract ImageNet's mean and divide by its standard deviation (the paper's code does not).
        epochs, batch_size: of the readouts' training; SGD with rate .1, a tenth of that from two thirds on.
        seed: of the readouts, their order of images, the samples of images and generated stimuli.
        limit_train, limit_test: use at most so many images, a random sample.
        num_workers: processes that read images.
        device: ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"``, ...
        labels: columns of the results that only the caller knows, such as ``run``, ``weights`` or ``task``.
        progress: called with (what runs, images done, images in all).

    Returns:
        :class:`~padprobe.results.Results`: rows of SPC, MAE, nMAE (95% bootstrap interval over images) and the number
        of constant predictions for every stimulus and target, for all stages together (``stages == "all"``) and for the
        RGB image alone (``"rgb"``); mean predicted maps and mean error maps.

    Raises:
        ValueError: naming the unknown target or layer, the empty folder, the unreadable image, or the image size that
            is too small for the encoder.

    Source: paper, sections 3.1 and 3.2.
    """
    labels = dict(labels or {})
    if isinstance(encoder, (str, Path)):
        labels = {"run": Path(encoder).stem, "encoder": str(encoder), "weights": "untrained", **labels}
        encoder = load_encoder(str(encoder))
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if test is None:
        test = {"dead_leaves": "dead_leaves", "black": "black", "white": "white", "noise": "noise"}
    train_images = load_images(train, image_size, limit_train, seed)
    # another seed: generated test stimuli are not those of the training
    test_images = {name: load_images(source, image_size, limit_test, seed + 1) for name, source in test.items()}
    names = find_stages(encoder, image_size) if stages == "auto" else list(stages)
    channels = sum(c for c, _, _ in stage_shapes(encoder, names, image_size))

    def readout(in_channels: int) -> PosENet:
        return PosENet(in_channels, targets, kernel_size, depth, padding, grid, image_size, seed)

    readouts = {"all": readout(channels).to(where), "rgb": readout(3).to(where)}
    was_training, home = encoder.training, next((p.device for p in encoder.parameters()), where)
    tap = StageTap(encoder, names, grid)
    try:
        encoder.eval().to(where)
        read = _Reader(encoder, tap, where, normalize, batch_size, num_workers)
        features = read.all(train_images, progress)
        train_readouts(readouts, features, epochs, batch_size, seed, progress)
        del features
        parts = [
            _score(read, readouts, name, images, {"seed": seed, "padding": padding_of(encoder), **labels}, progress)
            for name, images in test_images.items()
        ]
    finally:
        tap.remove()
        encoder.train(was_training).to(home)
    return Results.join(parts)


def padding_of(encoder: nn.Module) -> str:
    """The padding mode of an encoder's convolutions: "valid" where none pads, "mixed" where they differ."""
    modes = {row.mode for row in list_padding(encoder) if not row.mode.endswith("2d")}
    return modes.pop() if len(modes) == 1 else "mixed" if modes else "valid"


class _Reader:
    """Runs images through a tapped encoder: aligned features by readout name, ``all`` stages and ``rgb``."""

    def __init__(
        self, encoder: nn.Module, tap: StageTap, device: torch.device, normalize: bool, batch_size: int, workers: int
    ) -> None:
        self.encoder, self.tap, self.device, self.batch_size, self.workers = encoder, tap, device, batch_size, workers
        self.mean = torch.tensor(IMAGENET_MEAN if normalize else (0.0,) * 3, device=device)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD if normalize else (1.0,) * 3, device=device)[:, None, None]

    def batches(self, images: Images, what: str, progress: Progress | None):
        loader: DataLoader[Tensor] = DataLoader(
            images,  # type: ignore[arg-type]
            self.batch_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_stack,
        )
        done = 0
        for batch in loader:
            image = batch.to(self.device, non_blocking=True)
            yield self.features(image)
            done += len(image)
            if progress:
                progress(what, done, len(images))

    @torch.inference_mode()
    def features(self, image: Tensor) -> dict[str, Tensor]:
        seen = (image - self.mean) / self.std
        self.encoder(seen.contiguous(memory_format=torch.channels_last))
        return {"all": self.tap.take(), "rgb": align(image, self.tap.grid)}

    def all(self, images: Images, progress: Progress | None) -> dict[str, Tensor]:
        """The features of all images, float16, on the encoder's device."""
        kept: dict[str, Tensor] = {}
        start = 0
        for features in self.batches(images, "encoder pass", progress):
            for name, values in features.items():
                if name not in kept:
                    kept[name] = values.new_empty(len(images), *values.shape[1:], dtype=torch.float16)
                kept[name][start : start + len(values)] = values
            start += len(values)
        for name, values in kept.items():
            if not all(part.isfinite().all() for part in values.split(64)):
                raise ValueError(
                    f"the encoder's features ({name}) leave the range of half precision or are not finite: normalise "
                    "its input (normalize=True), or check its weights"
                )
        return kept


def _stack(items: list[Any]) -> Tensor:
    return torch.stack([image_of(item) for item in items])


def train_readouts(
    readouts: dict[str, PosENet],
    features: dict[str, Tensor],
    epochs: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Trains readouts side by side on features that were computed once, in place, and leaves them in evaluation mode.

    Args:
        readouts: by name.
        features: what each of them reads, by the same names: (N, C, grid, grid), any floating type.
        epochs: passes over the features.
        batch_size: images a step.
        seed: of the order of images, which all readouts share.
        progress: called with ("readouts", steps done, steps in all).

    Source: paper, section 3.2: SGD, 15 epochs; the authors' code: rate .1, a tenth of that from epoch 10 on.
    """
    n = len(next(iter(features.values())))
    optimizers = {name: make_optimizer(readout.train()) for name, readout in readouts.items()}
    # one buffer for every batch: a fresh 150 MB block costs more in page faults than the arithmetic on it
    buffers = {
        name: torch.empty(batch_size, *values.shape[1:], device=values.device) for name, values in features.items()
    }
    generator = torch.Generator().manual_seed(seed)
    steps = [order for _ in range(epochs) for order in torch.randperm(n, generator=generator).split(batch_size)]
    slow = 2 * len(steps) // 3
    for step, order in enumerate(steps):
        for name, readout in readouts.items():
            batch = buffers[name][: len(order)]
            if batch.device.type == "cpu":
                for row, index in zip(batch, order.tolist(), strict=True):
                    row.copy_(features[name][index])
            else:
                batch.copy_(features[name][order.to(batch.device)])
            optimizer = optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = 0.1 if step < slow else 0.01
            optimizer.zero_grad()
            readout.loss(batch).sum().backward()
            optimizer.step()
        if progress:
            progress("readouts", step + 1, len(steps))
    for readout in readouts.values():
        readout.eval()


def _score(
    read: _Reader,
    readouts: dict[str, PosENet],
    stimulus: str,
    images: Images,
    labels: dict[str, Any],
    progress: Progress | None,
) -> Results:
    """One stimulus's rows and maps, for every readout."""
    scores = {name: PositionScores(readout.maps).to(read.device) for name, readout in readouts.items()}
    sums: dict[str, Tensor] = {}
    for features in read.batches(images, stimulus, progress):
        for name, readout in readouts.items():
            with torch.inference_mode():
                prediction = readout(features[name])
                scores[name].update(prediction)
                for kind, maps in (("prediction", prediction), ("error", (prediction - readout.maps).abs())):
                    sums[f"{name}/{kind}"] = sums.get(f"{name}/{kind}", 0) + maps.sum(0)
    rows = []
    for name, readout in readouts.items():
        common = {
            **labels,
            "readout": "posenet",
            "kernel_size": readout.kernel_size,
            "depth": readout.depth,
            "head_padding": readout.padding,
            "stages": name,
            "stimulus": stimulus,
        }
        rows += [{**common, **row} for row in summarize(scores[name].per_image(), readout.targets)]
    prefix = f"{labels.get('run', '')}/{stimulus}"
    maps = {
        f"{prefix}/{target}/{kind}": (sums[f"all/{kind}"][i] / len(images)).cpu().numpy().astype(np.float32)
        for kind in ("prediction", "error")
        for i, target in enumerate(readouts["all"].targets)
    }
    return Results(pd.DataFrame(rows).reindex(columns=list(COLUMNS)), maps=maps)
