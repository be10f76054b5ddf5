"""Architectures that people bring: each is read right, or refused with a sentence."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.zoo.__main__ import PAGE, declared_rows
from tests.zoo.check import corner_images, find, known_maps, probe, tapped_maps, wrong_corners
from tests.zoo.networks import NETWORKS

WHY = 'a network of another package; `make test-zoo` installs it (pip install "padprobe[dev,hosts]")'
PACKAGES = {"smp": "segmentation_models_pytorch", "load_encoder": "timm"}  # where a library has another name
CASES = [
    pytest.param(network, size, id=f"{network.library}:{network.name}-{size[0]}x{size[1]}", marks=marks)
    for network in NETWORKS
    for size in network.sizes
    for marks in [[] if network.quick else [pytest.mark.zoo]]
]


@pytest.mark.parametrize(("network", "size"), CASES)
def test_a_network_is_read_right_or_refused(network, size):
    pytest.importorskip(PACKAGES.get(network.library, network.library), reason=WHY)
    torch.manual_seed(0)
    encoder = network.make(size)
    if size in network.refused:
        with pytest.raises(ValueError, match=re.escape(network.refused[size])):
            probe(encoder, size)
        return

    found = find(encoder, size)
    assert len(found.stages) >= 2
    maps, order = tapped_maps(encoder, found, size)
    assert order == found.stages  # each runs once, and later than the one before
    assert {stage: wrong for stage, features in maps.items() if (wrong := wrong_corners(features))} == {}
    for _, height, width in found.shapes:
        assert height / width == pytest.approx(size[0] / size[1], abs=2 / width)  # the map has the image's aspect
    for (_, above, _), (_, below, _) in pairwise(found.shapes):
        assert above >= below
    known = known_maps(encoder, size)
    if known is not None and len({height for _, height, _ in known}) == 1:
        known = known[1::2]  # a plain transformer: the blocks at even depths
    if known is not None:
        assert [channels for channels, _, _ in found.shapes] == [channels for channels, _, _ in known]
        cells = [side for _, *sides in found.shapes for side in sides]
        assert cells == pytest.approx([side for _, *sides in known for side in sides], abs=1)

    scores = probe(encoder, size)
    assert scores.between(-1, 1).all()


def test_the_zoo_is_large_and_has_all_libraries():
    libraries = {network.library for network in NETWORKS}
    assert libraries == {"torchvision", "timm", "smp", "transformers", "load_encoder"}
    assert len(NETWORKS) >= 60
    assert len({(network.library, network.name) for network in NETWORKS}) == len(NETWORKS)
    assert sum(network.quick for network in NETWORKS) == 8
    for network in NETWORKS:
        (height, width), (side, other) = network.sizes
        assert height != width
        assert side == other
        assert set(network.refused) <= set(network.sizes)


@pytest.mark.parametrize("mistake", ["none", "transposed", "channels last", "random order"])
def test_the_corner_test_sees_maps_of_the_wrong_layout(mistake):
    images = corner_images((64, 96))
    maps = torch.nn.functional.adaptive_avg_pool2d(images, (8, 8)).repeat(1, 3, 1, 1)[:, :8]  # (20, 8, 8, 8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    wrong = {
        "none": maps,
        "transposed": maps.transpose(2, 3),
        "channels last": maps.permute(0, 2, 3, 1),
        "random order": maps.flatten(2)[..., order].unflatten(2, (8, 8)),
    }
    assert bool(wrong_corners(wrong[mistake])) == (mistake != "none")


def test_the_page_of_the_documentation_has_every_network_and_its_verdict():
    """Written by `python -m tests.zoo`, which looks at each network."""
    lines = [line for line in Path(PAGE).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert [(row[0], row[1], row[2], row[-1]) for row in cells] == declared_rows()
