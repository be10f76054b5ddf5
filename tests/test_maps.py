import math

import pytest
import torch

from padprobe import position_maps
from padprobe.maps import TARGETS


def minmax(rows):
    low, high = min(map(min, rows)), max(map(max, rows))
    return torch.tensor([[(v - low) / (high - low) for v in row] for row in rows])


def direct(target, n):
    """PROTOCOL's formulas, pixel by pixel."""
    formula = {
        "H": lambda x, y: x / (n - 1),
        "V": lambda x, y: y / (n - 1),
        "G": lambda x, y: math.exp(-((x - n / 2) ** 2 + (y - n / 2) ** 2) / (2 * (n / 2) ** 2)),
        "HS": lambda x, y: (1 + math.cos(5 * math.pi * (y + 0.5) / n)) / 2,
        "VS": lambda x, y: (1 + math.cos(5 * math.pi * (x + 0.5) / n)) / 2,
    }[target]
    return minmax([[formula(x, y) for x in range(n)] for y in range(n)])


@pytest.mark.parametrize("size", [28, 96, 224])
@pytest.mark.parametrize("target", TARGETS)
def test_maps_match_the_formulas(target, size):
    ours = position_maps(size, [target])
    assert ours.dtype == torch.float32
    assert torch.allclose(ours[0], direct(target, size), atol=1e-6, rtol=0)


def test_horizontal_stripes_vary_along_y_and_vertical_ones_along_x():
    maps = dict(zip(TARGETS, position_maps(64), strict=True))
    for target, axis in {"H": 1, "V": 0, "HS": 0, "VS": 1}.items():
        assert maps[target].diff(dim=axis).abs().max() > 0.01
        assert maps[target].diff(dim=1 - axis).abs().max() == 0


def test_stripes_run_from_a_maximum_to_a_minimum_in_two_and_a_half_cycles():
    stripe = position_maps(200, ["VS"])[0, 0]
    slopes = stripe.diff().sign()
    turns = (slopes[slopes != 0].diff() != 0).sum()
    assert stripe[0] == 1
    assert stripe[-1] == 0
    assert turns == 4


def test_paper_scale_stretches_only_the_stripes():
    unit, paper = position_maps(50), position_maps(50, scale="paper")
    assert torch.equal(paper[:3], unit[:3])
    assert torch.allclose(paper[3:], 2 * unit[3:] - 1, atol=1e-6)


def test_oblong_maps_cover_both_axes():
    maps = position_maps((20, 50))
    assert maps.shape == (5, 20, 50)
    assert maps.amin((1, 2)).eq(0).all()
    assert maps.amax((1, 2)).eq(1).all()


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match=r"'VH'.*H, V, G, HS, VS"):
        position_maps(28, ["H", "VH"])
    with pytest.raises(ValueError, match="size is 1"):
        position_maps(1)
