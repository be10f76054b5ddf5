import math
import re

import numpy as np
import pytest
import torch

from padprobe import position_maps, spearman
from padprobe.maps import TARGETS, shuffled, size_pair, target_name
from padprobe.readout.posenet import upsampling


def minmax(rows):
    low, high = min(map(min, rows)), max(map(max, rows))
    return torch.tensor([[(v - low) / (high - low) for v in row] for row in rows])


def direct(target, size):
    """PROTOCOL's formulas, pixel by pixel."""
    h, w = size_pair(size)
    formula = {
        "H": lambda x, y: x / (w - 1),
        "V": lambda x, y: y / (h - 1),
        "G": lambda x, y: math.exp(-(((x - w / 2) / (w / 2)) ** 2 + ((y - h / 2) / (h / 2)) ** 2) / 2),
        "HS": lambda x, y: (1 + math.cos(5 * math.pi * (y + 0.5) / h)) / 2,
        "VS": lambda x, y: (1 + math.cos(5 * math.pi * (x + 0.5) / w)) / 2,
    }[target]
    return minmax([[formula(x, y) for x in range(w)] for y in range(h)])


@pytest.mark.parametrize("size", [28, 224, (30, 17), (41, 96)])
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
    control = position_maps(50, [shuffled("H", 10), shuffled("VS", 10)], scale="paper")
    assert control.amin((1, 2)).tolist() == [0, -1]


@pytest.mark.parametrize("size", [(7, 9), [7, 9], "7x9", torch.Size([7, 9]), (np.int64(7), np.int64(9))])
def test_a_size_is_a_height_and_a_width_however_it_is_written(size):
    assert size_pair(size) == (7, 9)
    assert type(size_pair(size)[0]) is int
    assert size_pair("12") == size_pair(12) == size_pair(np.int32(12)) == (12, 12)


BAD_SIZES = ["0x3", "224x", "x3", "3x4x5", "-3", "2.5", "", "large", (0, 5), (1, 2, 3), (), (7.0, 9), 224.0, True, None]


@pytest.mark.parametrize("size", [*BAD_SIZES, (True, 5), ("7", "9"), {"height": 3}])
def test_what_is_no_size_is_named_with_what_is_expected(size):
    message = f"size is {size!r}; expected pixels: 224 for a square, or height and width as 240x320"
    with pytest.raises(ValueError, match=re.escape(message)):
        size_pair(size)


def test_oblong_maps_cover_both_axes():
    maps = position_maps((20, 50))
    assert maps.shape == (5, 20, 50)
    assert maps.amin((1, 2)).eq(0).all()
    assert maps.amax((1, 2)).eq(1).all()


def diagonal(y, x):
    return x + 2 * y


def test_any_function_of_the_coordinates_is_a_target():
    maps = position_maps(30, ["H", diagonal])
    assert target_name(diagonal) == "diagonal"
    expected = (maps[0] + 2 * position_maps(30, ["V"])[0]) / 3
    assert torch.allclose(maps[1], expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"target 'flat' gives values from 0.0 to 0.0"):
        position_maps(8, [flat])


def flat(y, x):
    return 0 * y


@pytest.mark.parametrize("target", ["H", "G", diagonal])
def test_a_shuffled_target_has_the_targets_cells_in_other_places(target):
    """At the size of its cells no interpolation hides that it is a permutation."""
    cells = 13
    control = position_maps(cells, [shuffled(target, cells)])[0]
    original = position_maps(cells, [target])[0]
    assert torch.allclose(control.flatten().sort().values, original.flatten().sort().values, atol=1e-6)
    assert abs(spearman(control, original)) < 0.3
    assert target_name(shuffled(target, cells)).endswith(" shuffled")


def test_all_targets_are_shuffled_alike_and_at_any_size_a_grid_of_cells_can_say_them():
    h, v, both = position_maps(13, [shuffled(t, 13) for t in ("H", "V", diagonal)])
    assert torch.allclose(both, (h + 2 * v) / 3, atol=1e-6)
    large = position_maps(52, [shuffled("H", 13)]).double()
    up = upsampling(13, 52).double()
    assert torch.allclose(up @ torch.linalg.pinv(up) @ large @ torch.linalg.pinv(up).T @ up.T, large, atol=1e-5)


@pytest.mark.parametrize("cells", [4, 7, 8, 13, 22, 24, 26, 28])
@pytest.mark.parametrize("size", [96, (64, 90)])
def test_a_control_says_nothing_of_its_own_target(cells, size):
    controls = position_maps(size, [shuffled(target, cells) for target in TARGETS])
    assert spearman(controls, position_maps(size)).abs().max() < 0.02


def test_a_control_of_few_cells_is_the_best_there_is_and_one_of_equal_cells_is_refused():
    four = ["H", "V", "HS", "VS"]
    for cells, targets in {2: four, 3: TARGETS}.items():
        controls = position_maps(60, [shuffled(target, cells) for target in targets])
        assert spearman(controls, position_maps(60, targets)).abs().max() < 0.04
    with pytest.raises(ValueError, match=r"almost equal means over 5 x 5 cells.*another grid"):
        position_maps(60, [shuffled("HS", 5)])
    plane = position_maps(96, [diagonal, shuffled(diagonal, 26)])
    assert abs(spearman(plane[0], plane[1])) < 1 / 26


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match=r"'VH'.*H, V, G, HS, VS"):
        position_maps(28, ["H", "VH"])
    with pytest.raises(ValueError, match="size is 1"):
        position_maps(1)
