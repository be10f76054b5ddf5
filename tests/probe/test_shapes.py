"""Images that are not square."""

import numpy as np
import pytest
import torch
from torch import nn

from padprobe import load_encoder, probe_encoder
from padprobe.network.reach import padding_reach
from padprobe.network.stages import find_stages
from padprobe.network.trace import context_size
from padprobe.readout.spec import Readout

SIZE, GRID = (32, 52), 8
RIDGE = [Readout("ridge", kernel_size=1), Readout("ridge", stages="f2")]


def small_vgg():
    options = {"config": [8, "M", 16, 16, "M", 32], "out_channels": [8, 16, 32], "depth": 2, "batch_norm": True}
    return load_encoder("smp:vgg11", seed=0, options=options).eval()


def transposed(encoder):
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.mT.contiguous()
    return encoder


@pytest.fixture(scope="module")
def both():
    """One probe of images with their surroundings, and one of the same world reflected about its diagonal."""
    source, _ = context_size(small_vgg(), SIZE, find_stages(small_vgg(), SIZE))
    train, test = (torch.rand(n, 3, *source, generator=torch.Generator().manual_seed(n)) for n in (25, 20))
    options = {"readouts": RIDGE, "grid": GRID, "context": True, "selectivity": False, "untrained": 0}
    options |= {"targets": ["H", "V", "G"], "labels": {"run": "a"}}
    plain = probe_encoder(small_vgg(), train, {"t": test}, image_size=SIZE, **options)
    reflected = probe_encoder(transposed(small_vgg()), train.mT, {"t": test.mT}, image_size=SIZE[::-1], **options)
    return plain, reflected


def swapped(table):
    return table.assign(target=table["target"].replace({"H": "V", "V": "H"}))


def test_a_transposed_encoder_on_transposed_images_swaps_h_and_v(both):
    plain, reflected = both
    for name in ("rows", "profile"):
        keys = ["run", "stages", "stimulus", "target", "metric", *(["distance"] if name == "profile" else [])]
        ours, theirs = getattr(plain, name), swapped(getattr(reflected, name))
        keys = ["readout", "kernel_size", *keys]
        pairs = ours.round({"distance": 6}).merge(theirs.round({"distance": 6}), on=keys, suffixes=("", "_other"))
        assert len(pairs) == len(ours) == len(theirs)
        assert np.allclose(pairs["value"], pairs["value_other"], atol=2e-3, equal_nan=True)
        assert pairs["value"].std() > 0.1
    for key, values in plain.maps.items():
        other = key.translate(str.maketrans({"H": "V", "V": "H"}))
        assert np.allclose(values, reflected.maps[other].T, atol=2e-3)


def test_its_position_is_that_of_the_padding(both):
    rows = both[0].rows[(both[0].rows.metric == "spc") & (both[0].rows.stages == "all")]
    spc = rows.set_index(["run", "target"]).value
    assert spc["a"].min() > 0.6
    assert spc["a-context"].abs().max() < 0.2


def test_runs_state_heights_and_widths(both):
    sizes = ["image_px", "image_width", "source_px", "source_width", "shown_px", "shown_width"]
    runs = both[0].runs.set_index("run")[sizes]
    assert runs.loc["a"].tolist() == [32, 52, 50, 70, 32, 52]
    assert runs.loc["a-context"].tolist() == [32, 52, 50, 70, 50, 70]
    assert both[0].maps["a/t/H/prediction"].shape == SIZE


def in_pixels(cells, axis, first=0.5):
    """The distance of each row (axis 0) or column of cells to the nearer of its two borders; where first is 0, the
    outermost ones lie on the border."""
    step = SIZE[axis] / (cells - 1 + 2 * first)
    places = [(i + first) * step for i in range(cells)]
    return [min(place, SIZE[axis] - place) for place in places]


def by_distance(values, width, first=0.5, middle=0.5):
    """Means by rings of a width in pixels around (i + middle) * width, by a loop over all cells."""
    rings = {}
    for y, down in enumerate(in_pixels(values.shape[0], 0, first)):
        for x, right in enumerate(in_pixels(values.shape[1], 1, first)):
            ring = int(min(down, right) / width + 0.5 - middle + 1e-6)
            rings.setdefault((ring + middle) * width, []).append(values[y, x])
    return {distance: np.mean(ring) for distance, ring in sorted(rings.items())}


def test_the_border_profile_is_by_pixels_to_the_nearest_border(both):
    results, stages = both[0], find_stages(small_vgg(), SIZE)
    mine = results.profile[results.profile.run == "a"]
    expected = {("mae", "all", target): results.maps[f"a/t/{target}/error"] for target in "HVG"}
    expected = {key: by_distance(values, 32 / GRID) for key, values in expected.items()}
    for i, stage in enumerate(stages):
        name, cells = f"f{i + 1}", padding_reach(small_vgg(), [stage], SIZE)[stage].numpy()
        expected["reach", name, ""] = by_distance(cells, max(32 / GRID, 32 / cells.shape[0]))
        expected["eta2", name, ""] = by_distance(results.maps[f"a/t/{name}/eta2"], 32 / (GRID - 1), 0, 0)
    for (metric, stage, target), profile in expected.items():
        rows = mine[(mine.metric == metric) & (mine.stages == stage) & (mine.target == target)]
        assert rows.distance.tolist() == pytest.approx(list(profile))
        assert rows.value.tolist() == pytest.approx(list(profile.values()), abs=1e-5)


def test_it_reads_position_as_well_as_a_square_of_its_sides():
    """Each axis against the squares of the two sides: between, or no further off than readouts differ."""
    found = {}
    for size in (24, (24, 32), 32):
        options = {"image_size": size, "grid": GRID, "epochs": 6, "batch_size": 8, "limit_train": 40, "limit_test": 20}
        rows = probe_encoder(small_vgg(), "noise", {"n": "noise"}, untrained=0, targets=["H", "V"], **options).rows
        found[size] = rows[(rows.metric == "spc") & (rows.stages == "all")].set_index("target").value
    for target, same in (("V", 24), ("H", 32)):
        assert found[24, 32][target] > 0.6
        assert found[24, 32][target] == pytest.approx(found[same][target], abs=0.12)


@pytest.mark.parametrize("size", [(6, 40), (40, 6), (2, 9), 6])
def test_a_side_below_the_grid_has_rings_of_one_pixel(size):
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    options = {"image_size": size, "grid": 12, "epochs": 1, "targets": ["H", "V"], "stages": ["1"], "untrained": 0}
    options["selectivity"] = False  # refused where there are fewer pixels than cells
    profile = probe_encoder(encoder, "noise", {"n": "noise"}, limit_train=4, limit_test=2, **options).profile
    sides = (size, size) if isinstance(size, int) else size
    mae = profile[(profile.metric == "mae") & (profile.target == "H")]
    assert mae.distance.tolist() == [i + 0.5 for i in range((min(sides) + 1) // 2)]
    assert profile.value.notna().all()


def test_images_of_the_transposed_size_are_named():
    with pytest.raises(ValueError, match=r"has shape \(3, 48, 32\); expected \(3, 32, 48\) for image_size \(32, 48\)"):
        probe_encoder(small_vgg(), torch.rand(4, 3, 48, 32), {}, image_size=(32, 48))
    with pytest.raises(ValueError, match=r"expected \(3, 50, 70\) for image_size \(32, 52\) with its surroundings"):
        probe_encoder(small_vgg(), torch.rand(4, 3, 32, 52), {}, image_size=SIZE, context=True)
