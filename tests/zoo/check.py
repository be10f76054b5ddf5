"""What the zoo tries on one network at one image size, without relying on what it tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pandas import Series
from torch import Tensor, nn

from padprobe import find_stages, probe_encoder
from padprobe.network.layout import Layout, find_layouts
from padprobe.network.tap import StageTap
from padprobe.network.trace import stage_shapes
from tests.zoo.networks import Pair

OPTIONS = {"limit_train": 8, "limit_test": 2, "epochs": 1, "settle": True, "grid": 8, "selectivity": False}
GRID = 8
CORNERS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Found:
    """What padprobe says about a network."""

    stages: list[str]
    shapes: list[tuple[int, int, int]]
    layouts: dict[str, Layout]


def find(encoder: nn.Module, size: Pair) -> Found:
    """The stages of an encoder, with their maps' shapes and their outputs' layouts.

    Raises:
        ValueError: where padprobe refuses the network.
    """
    stages = find_stages(encoder, size)
    return Found(stages, stage_shapes(encoder, stages, size), find_layouts(encoder, stages, size))


def corner_images(size: Pair) -> Tensor:
    """Images (20, 3, H, W): four of noise, then the same four with each corner, a third of each side, inverted."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    images = torch.rand(1, 4, 3, height, width, generator=generator).repeat(5, 1, 1, 1, 1)
    for i in range(4):
        rows = slice(0, height // 3) if i < 2 else slice(-(height // 3), None)
        columns = slice(0, width // 3) if i % 2 == 0 else slice(-(width // 3), None)
        images[i + 1, ..., rows, columns] = 1 - images[i + 1, ..., rows, columns]
    return images.flatten(0, 1)


def settle(encoder: nn.Module, images: Tensor) -> None:
    """Gives the BatchNorms the statistics of these images: untrained ones let the features fade, layer by layer."""
    encoder.eval()
    for layer in encoder.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all images
            layer.train()
    with torch.no_grad():
        encoder(images)
    encoder.eval()


def tapped_maps(encoder: nn.Module, found: Found, size: Pair) -> tuple[dict[str, Tensor], list[str]]:
    """Each stage's maps (20, C, grid, grid) of the corner images, and the stages in the order in which they ran."""
    images, order = corner_images(size), list[str]()
    settle(encoder, images)

    def note(stage: str) -> Any:
        return lambda module, args, output: order.append(stage)

    tap = StageTap(encoder, found.stages, GRID, layouts=found.layouts)
    handles = [encoder.get_submodule(stage).register_forward_hook(note(stage)) for stage in found.stages]
    try:
        with torch.no_grad():
            encoder(images)
        maps = tap.take()
    finally:
        tap.remove()
        for handle in handles:
            handle.remove()
    widths = [channels for channels, _, _ in found.shapes]
    return dict(zip(found.stages, maps.split(widths, dim=1), strict=True)), order


def wrong_corners(maps: Tensor) -> list[str]:
    """The corners of the image whose change moves another corner of the maps (20, C, grid, grid) most.

    Beyond what moves all corners: deep in a network some corners of a map react more than others, whatever changes, and
    some changes move all of it. Both are divided out.
    """
    change = (maps[4:].unflatten(0, (4, 4)) - maps[:4]).abs().mean((1, 2))  # (4, grid, grid): by changed corner
    half = maps.shape[-1] // 2
    quarters = change.unflatten(1, (2, half)).unflatten(3, (2, half)).mean((2, 4)).flatten(1)  # (4, 4)
    logs = quarters.clamp(min=1e-6 * quarters.max()).log()
    beyond = logs - logs.mean(0, keepdim=True) - logs.mean(1, keepdim=True)
    return [f"{CORNERS[i]} moves {CORNERS[j]}" for i, j in enumerate(beyond.argmax(1).tolist()) if i != j]


def known_maps(encoder: nn.Module, size: Pair) -> list[tuple[int, int, int]] | None:
    """(channels, height, width) of all that timm's ``feature_info`` lists; None for networks of other libraries.

    None too for a plain transformer's wrapper, which returns the last blocks only.
    """
    info = getattr(encoder, "feature_info", None)
    if info is None:
        return None
    height, width = size
    entries = [info[i] for i in info.out_indices] if hasattr(info, "out_indices") else info
    if hasattr(info, "out_indices") and len({entry["reduction"] for entry in entries}) == 1:
        return None
    return [(e["num_chs"], -(-height // e["reduction"]), -(-width // e["reduction"])) for e in entries]


def probe(encoder: nn.Module, size: Pair) -> Series:
    """Every SPC of a tiny probe."""
    rows = probe_encoder(encoder, "noise", {"noise": "noise"}, image_size=size, **OPTIONS).rows
    return rows[rows["metric"] == "spc"]["value"]
