"""How long a cell will take, from a few steps of it here and now."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from padprobe.network.encoders import find_encoder, load_encoder
from padprobe.network.padding import as_built
from padprobe.network.trace import context_size, stage_shapes
from padprobe.readout.posenet import PosENet, make_optimizer
from padprobe.readout.spec import Readout, with_controls
from padprobe.scores import score_maps, standard_ranks
from padprobe.study.plan import Cell
from padprobe.study.training import build

_BATCH = 4


def seconds_to_run(cell: Cell, readouts: list[Readout], layers: list[str], images: tuple[int, int]) -> float:
    """Seconds that a cell's training and probe will take, without the reading of images.

    Args:
        cell: what to run.
        readouts: those that have not been made.
        layers: the encoder's stages.
        images: numbers of training and test images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = 0.0
    if cell.fit:
        with tempfile.TemporaryDirectory() as folder:
            step = _Steps()
            plain = {"trainer.logger": False, "trainer.enable_checkpointing": False, "trainer.callbacks": []}
            short = {"trainer.limit_train_batches": 3, "trainer.limit_val_batches": 0, "trainer.max_epochs": 1}
            whole = build(cell, Path(folder), plain)
            data: Any = whole.datamodule
            data.setup("fit")
            steps = len(data.train_dataloader()) * (whole.trainer.max_epochs or 1)
            cli = build(cell, Path(folder), {**plain, **short}, callbacks=[step])
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        seconds += steps * (step.times[-1] - step.times[0]) / max(len(step.times) - 1, 1)
        encoder = cli.model.get_submodule(find_encoder(cli.model))
    else:
        encoder = load_encoder(cell.encoder, cell.weights, cell.padding, cell.seeds[0], cell.options)
    if not readouts:
        return seconds
    encoder = encoder.eval().to(device)
    each = _of_pass(encoder, cell.image_size, device)
    if cell.context:
        shown = context_size(encoder, cell.image_size, layers)[0]
        with as_built(encoder, "valid"):
            each += _of_pass(encoder, shown, device)
    widths = [channels for channels, _, _ in stage_shapes(encoder, layers, cell.image_size)]
    names = [f"f{i + 1}" for i in range(len(layers))]
    variants = with_controls(readouts, names)
    width = dict(zip(names, widths, strict=True))
    made = sum(_of_step(cell, readout, _width(readout, width), device) for readout in variants)
    scored = len(variants) * _of_score(cell, device)
    train, test = images
    runs = (1 + cell.context) * len(cell.seeds)
    return seconds + each * (train + test) + runs * (made * train * cell.epochs + scored * test)


class _Steps(Callback):
    """Takes the time at every step's end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter())


@torch.inference_mode()
def _of_pass(encoder: nn.Module, side: int, device: torch.device) -> float:
    """Seconds an image of an encoder's pass."""
    images = torch.rand(_BATCH, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return _timed(lambda: encoder(images), device)


def _of_step(cell: Cell, readout: Readout, width: int, device: torch.device) -> float:
    """Seconds an image and epoch of a readout; a ridge readout counts as a trained one."""
    targets = 2 * len(cell.targets)  # the permuted ones too
    net = PosENet(width, ["H"] * targets, readout.kernel_size, readout.depth, readout.padding, cell.grid).to(device)
    features, optimizer = torch.rand(_BATCH, width, cell.grid, cell.grid, device=device), make_optimizer(net)

    def step() -> None:
        optimizer.zero_grad()
        net.loss(features).sum().backward()
        optimizer.step()

    return _timed(step, device)


def _of_score(cell: Cell, device: torch.device) -> float:
    """Seconds an image of a readout's scores."""
    maps = torch.rand(2 * len(cell.targets), cell.image_size, cell.image_size, device=device)
    ranks = standard_ranks(maps)
    return _timed(lambda: score_maps(torch.rand(_BATCH, *maps.shape, device=device), maps, ranks), device)


def _timed(step: Any, device: torch.device) -> float:
    """Seconds an image of the second of two calls."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / _BATCH


def _width(readout: Readout, widths: dict[str, int]) -> int:
    if readout.stages == "rgb":
        return 3
    return sum(widths.values()) if readout.stages == "all" else sum(widths[s] for s in set(readout.stages.split("+")))
