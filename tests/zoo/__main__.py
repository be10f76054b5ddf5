"""Writes docs/networks.md: `python -m tests.zoo`."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.zoo.check import find
from tests.zoo.networks import NETWORKS, Network

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
HEAD = """\
# Networks

What padprobe makes of {count} architectures, without training and without downloads, each at one non-square and one
square image. `make test-zoo` checks every row: the stages are maps of the right layout (changing one corner of the
image changes that corner of the maps most), each is deeper than the one before, and their channels and sizes are those
of timm's `feature_info` where the network has one. A network that cannot be read is refused before any work, with the
sentence in the last column.

Stages are written channels x height x width, for the first image size that is not refused. In the layout, `NCHW` and
`NHWC` are maps, and `tokens` are a sequence that becomes a map (class and register tokens are left out). Some networks
are built shallow or narrow: see `tests/zoo/networks.py`. `load_encoder` is what `padprobe probe` uses.

This page is written by `python -m tests.zoo`.

| library | network | images | stages | layout | verdict |
|---|---|---|---|---|---|
"""


def image_sizes(network: Network) -> str:
    return ", ".join(f"{height} x {width}" for height, width in network.sizes)


def declared_rows() -> list[tuple[str, str, str, str]]:
    """(library, network, images, verdict) of every network."""
    return [(network.library, network.name, image_sizes(network), network.verdict) for network in NETWORKS]


def row(network: Network) -> str:
    """One line of the table; a network that is refused at both sizes has no stages."""
    size = next((size for size in network.sizes if size not in network.refused), None)
    stages, layout = "", ""
    if size:
        torch.manual_seed(0)
        found = find(network.make(size), size)
        stages = ", ".join(" x ".join(map(str, shape)) for shape in found.shapes)
        layout = ", ".join(dict.fromkeys(layout.kind for layout in found.layouts.values()))
    cells = [network.library, network.name, image_sizes(network), stages, layout, network.verdict]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    lines = [row(network) for network in NETWORKS]
    PAGE.write_text(HEAD.format(count=len(NETWORKS)) + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
