import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.stats import rankdata, spearmanr, t
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from padprobe import position_maps, scores, spearman
from padprobe.results import summarize, t_quantile
from padprobe.scores import (
    BorderProfile,
    PositionScores,
    average_ranks,
    border_distance,
    constant_error,
    is_constant,
    rings,
)

few_values = st.sampled_from([-2.5, -1.0, 0.0, 1.0, 3.0])  # many ties, and often a constant
values = st.floats(-1e6, 1e6, width=32)
shapes = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8)


@st.composite
def pairs(draw):
    shape = draw(shapes)
    elements = st.sampled_from([few_values, values])
    return tuple(draw(arrays(np.float32, shape, elements=draw(elements))) for _ in range(2))


@settings(max_examples=300, deadline=None)
@given(pairs())
def test_spearman_is_scipys_and_zero_for_constants(pair):
    a, b = pair
    ours = spearman(torch.from_numpy(a), torch.from_numpy(b)).item()
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert ours == 0
    else:
        assert ours == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-9)


def test_spearman_broadcasts_and_ranks_large_maps_exactly():
    torch.manual_seed(0)
    target = position_maps(224)
    prediction = (target + 0.3 * torch.randn(2, 5, 224, 224)).mul(8).round()  # tens of thousands of ties
    ours = spearman(prediction, target)
    assert ours.shape == (2, 5)
    for b in range(2):
        for k in range(5):
            expected = spearmanr(prediction[b, k].ravel().numpy(), target[k].ravel().numpy()).statistic
            assert ours[b, k].item() == pytest.approx(expected, abs=1e-9)


def test_monotone_changes_leave_spearman_and_reversal_flips_it():
    target = position_maps(32, ["G"])[0]
    assert spearman(target.exp(), target).item() == pytest.approx(1)
    assert spearman(-target, target).item() == pytest.approx(-1)


def test_bad_maps_are_refused():
    with pytest.raises(ValueError, match="resize"):
        spearman(torch.zeros(4, 4), torch.zeros(5, 5))
    with pytest.raises(ValueError, match="no rank"):
        spearman(torch.full((4, 4), torch.nan), torch.rand(4, 4))


def test_best_constant_errors_are_those_of_the_protocol():
    errors = constant_error(position_maps(224))
    assert errors == pytest.approx(torch.tensor([0.251, 0.251, 0.197, 0.318, 0.318]), abs=1e-3)
    for constant in (0.3, 0.45, 0.55, 0.7):  # no constant does better
        assert ((position_maps(224) - constant).abs().mean((1, 2)) >= errors - 1e-6).all()


def test_float_noise_on_a_constant_scores_zero_and_is_counted():
    torch.manual_seed(0)
    target = position_maps(64)
    noise = 0.5 + 1e-7 * torch.randn(3, 5, 64, 64)
    assert is_constant(noise, target).all()
    scores = PositionScores(target)
    scores.update(noise)
    scores.update(target[None])
    result = scores.compute()
    assert result["spc"][:3].eq(0).all()
    assert result["constant"].sum(0).tolist() == [3] * 5
    assert result["spc"][3] == pytest.approx(torch.ones(5))
    assert result["mae"][3].eq(0).all()


def test_streamed_scores_are_scipys_image_by_image_in_any_batching():
    torch.manual_seed(0)
    target = position_maps(40, ["H", "G"])
    predictions = target + torch.rand(7, 2, 40, 40)
    expected = [
        [spearmanr(p[k].ravel().numpy(), target[k].ravel().numpy()).statistic for k in range(2)] for p in predictions
    ]
    for split in (1, 3, 7):
        scores = PositionScores(target)
        for batch in predictions.split(split):
            scores.update(batch)
        result = scores.compute()
        assert result["spc"].numpy() == pytest.approx(np.array(expected), abs=1e-6)
        assert result["mae"].numpy() == pytest.approx((predictions - target).abs().mean((2, 3)).numpy(), abs=1e-6)
        assert (result["nmae"] * constant_error(target)).numpy() == pytest.approx(result["mae"].numpy(), abs=1e-6)


def test_a_prediction_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="no rank"):
        PositionScores(position_maps(16)).update(torch.full((1, 5, 16, 16), torch.nan))


def test_one_image_and_one_target_keep_their_shape():
    scores = PositionScores(position_maps(32, ["H"]))
    scores.update(torch.rand(1, 1, 32, 32))
    assert scores.per_image()["spc"].shape == (1, 1)


def test_a_prediction_of_another_size_is_refused():
    with pytest.raises(ValueError, match="expected"):
        PositionScores(position_maps(32)).update(torch.rand(2, 5, 16, 16))


def test_summary_means_over_images_with_an_interval_around_them():
    generator = torch.Generator().manual_seed(0)
    scores = {"spc": torch.randn(400, 2, generator=generator) + 3, "constant": torch.ones(400, 2, dtype=torch.bool)}
    rows = {(row["metric"], row["target"]): row for row in summarize(scores, ["H", "V"])}
    row = rows["spc", "H"]
    standard_error = scores["spc"][:, 0].std().item() / 20
    assert row["value"] == pytest.approx(scores["spc"][:, 0].mean().item())
    assert row["ci_low"] == pytest.approx(row["value"] - 1.96 * standard_error, abs=0.4 * standard_error)
    assert row["ci_high"] == pytest.approx(row["value"] + 1.96 * standard_error, abs=0.4 * standard_error)
    assert row["n"] == 400
    assert rows["constant", "V"]["value"] == 400
    assert np.isnan(summarize({"spc": torch.ones(1, 1)}, ["H"])[0]["ci_low"])


def test_the_quantiles_are_scipys():
    for df in (1, 2, 3, 7, 29, 199, 4999, 10**6):
        assert t_quantile(df) == pytest.approx(t.ppf(0.975, df), rel=1e-5)


BOUNDED = {
    "beta(5, 2)": (lambda rng, shape: rng.beta(5, 2, shape), 5 / 7),
    "beta(2, 5)": (lambda rng, shape: rng.beta(2, 5, shape), 2 / 7),
    "beta(20, 3)": (lambda rng, shape: rng.beta(20, 3, shape), 20 / 23),
    "normal after Fisher's z": (lambda rng, shape: np.tanh(rng.normal(0.6, 0.3, shape)), 0.5071),
    "around 0": (lambda rng, shape: np.tanh(rng.normal(0, 0.2, shape)), 0.0),
}


@pytest.mark.parametrize("scores", BOUNDED)
@pytest.mark.parametrize("n", [4, 8, 30, 200])
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(n, scores):
    draw, mean = BOUNDED[scores]
    values = draw(np.random.default_rng(n), (n, 5000))
    rows = summarize({"spc": torch.from_numpy(values)}, [""] * 5000)
    assert 0.93 <= np.mean([row["ci_low"] <= mean <= row["ci_high"] for row in rows]) <= 0.97


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("n", [1, 8, 30, 200])
def test_the_interval_of_delta_holds_0_for_a_network_that_is_itself_untrained(n, k):
    """Networks differ by 0.1, images by 0.1 in all networks alike, and the rest by 0.08."""
    rng = np.random.default_rng(n)
    scores = rng.normal(0, 0.1, (k + 1, 1, 2000)) + rng.normal(0, 0.1, (n, 2000))
    scores = torch.from_numpy(scores + rng.normal(0, 0.08, (k + 1, n, 2000)))
    rows = summarize({"delta": scores[0] - scores[1:].mean(0)}, [""] * 2000, scores[1:])
    assert 0.93 <= np.mean([row["ci_low"] <= 0 <= row["ci_high"] for row in rows]) <= 0.97


def test_one_twin_gives_no_interval_of_delta_and_twins_that_agree_that_over_images():
    scores = torch.rand(9, 2, generator=torch.Generator().manual_seed(0))
    [row, _] = summarize({"delta": scores}, ["H", "V"], torch.zeros(1, 9, 2))
    assert np.isnan([row["ci_low"], row["ci_high"]]).all()
    [row, _] = summarize({"delta": scores}, ["H", "V"], torch.zeros(3, 9, 2))
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(
        t.interval(0.95, 8, scores[:, 0].mean().item(), scores[:, 0].std().item() / 3)
    )


def test_rings_are_the_pixels_by_their_distance_to_the_nearest_border():
    found = rings(border_distance(12, 9), 2.0)
    assert sorted(torch.cat(found).tolist()) == list(range(108))
    for i, ring in enumerate(found):
        for pixel in ring.tolist():
            y, x = divmod(pixel, 9)
            assert 2 * i <= min(y, x, 11 - y, 8 - x) < 2 * (i + 1)


@pytest.mark.parametrize("first", [0.5, 0])
def test_the_border_distance_is_that_to_the_nearest_of_the_four_borders(first):
    height, width, cell = 6, 4, (3.0, 7.0)
    distance = border_distance(height, width, cell, first)
    for y in range(height):
        for x in range(width):
            down, right = (y + first) * cell[0], (x + first) * cell[1]
            far = (height - 1 + 2 * first) * cell[0], (width - 1 + 2 * first) * cell[1]
            assert distance[y, x] == pytest.approx(min(down, far[0] - down, right, far[1] - right))


def test_the_border_profile_finds_where_the_map_is_right():
    """A prediction that knows H in the outermost two rings and nothing inside them."""
    target = position_maps(32, ["H", "G"])
    prediction = torch.rand(6, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    y, x = torch.arange(32)[:, None], torch.arange(32)[None, :]
    distance = torch.minimum(torch.minimum(y, 31 - y), torch.minimum(x, 31 - x))
    prediction[:, 0, distance < 8] = target[0, distance < 8]
    profile = BorderProfile(target, 4.0)
    scores = profile.score(prediction)
    assert profile.distances == [2.0, 6.0, 10.0, 14.0]
    assert scores["spc"].shape == (6, 2, 4)
    assert torch.allclose(scores["spc"][:, 0, :2], torch.ones(6, 2))
    assert torch.allclose(scores["mae"][:, 0, :2], torch.zeros(6, 2), atol=1e-6)
    assert scores["spc"][:, 0, 2:].abs().mean() < 0.2
    assert scores["mae"][:, 0, 2:].min() > 0.15
    for ring, (low, high) in enumerate([(0, 4), (4, 8), (8, 12), (12, 16)]):
        where = (low <= distance) & (distance < high)
        expected = spearmanr(prediction[3, 1, where].numpy(), target[1, where].numpy()).statistic
        assert scores["spc"][3, 1, ring] == pytest.approx(expected, abs=1e-6)
    constant = profile.score(target.mean((1, 2))[None, :, None, None] + 1e-9 * prediction)
    assert constant["spc"].abs().max() == 0


def test_a_map_of_an_odd_side_has_one_pixel_in_the_middle_which_has_no_order():
    maps = position_maps(5, ["H", "V"])
    profile = BorderProfile(maps, 1.0).score(maps[None])
    assert [len(ring) for ring in rings(border_distance(5, 5), 1.0)] == [16, 8, 1]
    assert torch.allclose(profile["spc"], torch.tensor([1.0, 1.0, 0.0]).expand(1, 2, 3))
    assert average_ranks(torch.tensor([[3.0]])).tolist() == [[0.0]]


@pytest.mark.parametrize("shape", [(3, 4, 500), (1, 999), (300, 7), (0, 5), (2, 1)])
def test_ranks_in_parts_are_the_ranks_of_each_row(shape, monkeypatch):
    monkeypatch.setattr(scores, "CHUNK", 1000)  # rows above and below it
    values = torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(0)).float()
    assert np.array_equal(average_ranks(values), rankdata(values.numpy(), axis=-1) - 1)


def test_ranking_many_maps_takes_little_more_memory_than_their_ranks():
    """On fake tensors of a GPU, which have shapes and a device and no values: 60 maps."""

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            sizes.extend(t.nbytes for t in tree_leaves(output) if isinstance(t, torch.Tensor))
            devices.update(t.device.type for t in tree_leaves(output) if isinstance(t, torch.Tensor))
            return output

    sizes: list[int] = []
    devices: set[str] = set()
    with FakeTensorMode():
        maps = torch.empty(6, 10, 224 * 224, device="cuda")
        with Largest():
            average_ranks(maps)
    result, *temporaries = sorted((size for size in sizes if size != maps.nbytes), reverse=True)
    assert result == 2 * maps.nbytes  # float64
    views = {result, maps.nbytes}
    assert max(size for size in temporaries if size not in views) <= 8 * scores.CHUNK
    assert devices == {"cuda"}
