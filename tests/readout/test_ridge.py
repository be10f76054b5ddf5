import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from padprobe.maps import position_maps
from padprobe.readout.ridge import (
    GRAM_LIMIT_GB,
    LAMBDAS,
    RidgeReadout,
    RidgeStatistics,
    gram_gb,
    solve,
    solve_by_gradients,
)
from padprobe.scores import spearman

TARGETS = ("H", "G", "VS")
MAPS = position_maps(32, TARGETS)
OBLONG = position_maps((24, 40), TARGETS)


def random_features(images=20, channels=5, grid=8, seed=0):
    """Noise of various means and sds; channel 0 follows x and channel 1 follows y, weakly."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, channels, grid, grid, generator=generator)
    features[:, 0] += torch.linspace(-1, 1, grid)
    features[:, 1] += torch.linspace(-1, 1, grid)[:, None]
    size = torch.linspace(0.5, 20, channels)[:, None, None]
    return features * size + size.flip(0)


def last_held_out(images, count):
    return torch.arange(images) >= images - count


def statistics_of(features, held_out, kernel_size=1, batch_size=4):
    statistics = RidgeStatistics(features.shape[1], kernel_size, features.shape[-1])
    for part, marks in zip(features.split(batch_size), held_out.split(batch_size), strict=True):
        statistics.update(part, marks)
    return statistics


def gradient_batches(features, held_out, batch_size=4):
    return lambda: zip(features.split(batch_size), held_out.split(batch_size), strict=True)


def dense(features, kernel_size, lam, maps=MAPS):
    """Weights (T, C, k, k) and biases (T,) by scipy's least squares, the penalty as further rows of the system."""
    side = features.shape[-1] - kernel_size + 1
    x = F.unfold(features.double(), kernel_size).transpose(1, 2).flatten(0, 1).numpy()  # (n * cells, d)
    t = F.adaptive_avg_pool2d(maps.double(), side).flatten(1).T.repeat(len(features), 1).numpy()
    n, d = x.shape
    mean, sd = x.mean(0), x.std(0)
    left = np.concatenate([(x - mean) / sd, np.sqrt(n * lam) * np.eye(d)])
    right = np.concatenate([t - t.mean(0), np.zeros((d, t.shape[1]))])
    weight = scipy.linalg.lstsq(left, right)[0].T / sd
    bias = t.mean(0) - weight @ mean
    shape = (len(maps), features.shape[1], kernel_size, kernel_size)
    return torch.tensor(weight).reshape(shape).float(), torch.tensor(bias).float()


def assert_close(readout, weight, bias, features, tolerance):
    """Each weight, on the scale of the largest effect of any, and the predictions."""
    sd = features.std((0, 2, 3))[:, None, None]
    assert ((readout.weight - weight) * sd).abs().max() < tolerance * (weight * sd).abs().max()
    small = F.conv2d(features, weight, bias)
    assert (readout.predict_small(features) - small).abs().max() < tolerance
    full = F.interpolate(small, readout.size, mode="bilinear", align_corners=False)
    assert (readout(features) - full).abs().max() < tolerance


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("lam", "maps"), [(1e-5, MAPS), (0.3, MAPS), (0.3, OBLONG)])
def test_the_solution_is_that_of_dense_least_squares_on_all_images(kernel_size, lam, maps):
    features, held_out = random_features(), last_held_out(20, 5)
    readout = solve(statistics_of(features, held_out, kernel_size), TARGETS, maps, [lam])
    assert_close(readout, *dense(features, kernel_size, lam, maps), features, 2e-5)
    assert readout.lam == (lam,) * 3


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("lam", "maps"), [(1e-5, MAPS), (0.3, MAPS), (0.3, OBLONG)])
def test_gradients_reach_the_solution_of_dense_least_squares_on_the_images_to_fit(kernel_size, lam, maps):
    features = random_features()
    held_out = torch.arange(20) % 4 == 1  # some in every batch
    readout = solve_by_gradients(
        gradient_batches(features, held_out), 5, TARGETS, maps, kernel_size, 8, [lam], iterations=100
    )
    fitted = features[~held_out]
    assert_close(readout, *dense(fitted, kernel_size, lam, maps), fitted, 1e-4)


@pytest.mark.parametrize("lambdas", [[1e-3, 1e-1, 1.0], [1.0, 1e-3, 1e-1]])
def test_gradients_solve_every_lambda_in_one_run_and_choose_as_dense_least_squares_does(lambdas):
    features, held_out = random_features(channels=30), last_held_out(20, 12)
    sweeps = []

    def batches():
        sweeps.append(1)
        return gradient_batches(features, held_out)()

    readout = solve_by_gradients(batches, 30, TARGETS, MAPS, 3, 8, lambdas, iterations=500)
    assert len(sweeps) < 502  # stopped early
    left_out, fitted = features[held_out], features[~held_out]
    cells = F.adaptive_avg_pool2d(MAPS, 6)
    paths = {lam: dense(fitted, 3, lam) for lam in lambdas}
    errors = {lam: (F.conv2d(left_out, *path) - cells).square().mean((0, 2, 3)) for lam, path in paths.items()}
    expected = tuple(min(lambdas, key=lambda lam: errors[lam][t].item()) for t in range(3))
    assert readout.lam == expected
    assert max(expected) > min(lambdas)  # shifted systems were used
    weight = torch.stack([paths[lam][0][t] for t, lam in enumerate(expected)])
    bias = torch.stack([paths[lam][1][t] for t, lam in enumerate(expected)])
    assert_close(readout, weight, bias, fitted, 1e-4)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_batch_size_and_order_of_images_do_not_matter(kernel_size):
    features, held_out = random_features(), torch.arange(20) % 4 == 1
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    readouts = [
        solve(statistics_of(f, h, kernel_size, batch_size), TARGETS, MAPS)
        for f, h, batch_size in (
            (features, held_out, 1),
            (features, held_out, 20),
            (features[order], held_out[order], 7),
        )
    ]
    for other in readouts[1:]:
        assert other.lam == readouts[0].lam
        assert torch.allclose(other.weight, readouts[0].weight, atol=1e-6)
        assert torch.allclose(other(features), readouts[0](features), atol=1e-6)


def test_summed_statistics_of_two_processes_are_those_of_one():
    features, held_out = random_features(), torch.arange(20) % 4 == 1
    whole = statistics_of(features, held_out, 3)
    merged, other = statistics_of(features[:13], held_out[:13], 3), statistics_of(features[13:], held_out[13:], 3)
    for name, reduce in merged._reductions.items():  # what torchmetrics' sync does
        setattr(merged, name, reduce(torch.stack([getattr(merged, name), getattr(other, name)])))
    for name, state in whole.compute().items():
        assert torch.allclose(merged.compute()[name], state, rtol=1e-6)
    a, b = solve(whole, TARGETS, MAPS), solve(merged, TARGETS, MAPS)
    assert a.lam == b.lam
    assert torch.allclose(a(features), b(features), atol=1e-6)


@pytest.mark.parametrize("way", ["gram", "gradients"])
def test_a_position_signal_is_read_on_new_images_and_only_where_there_is_one(way):
    maps = position_maps(32, ["H"])

    def score(channels):
        def draw(seed):
            noise = torch.randn(40, 6, 8, 8, generator=torch.Generator().manual_seed(seed))
            noise[:, 5] = torch.linspace(-1, 1, 8) + 0.2 * noise[:, 5]
            return noise[:, channels]

        features, held_out = draw(0), last_held_out(40, 10)
        if way == "gram":
            readout = solve(statistics_of(features, held_out), ["H"], maps)
        else:
            readout = solve_by_gradients(gradient_batches(features, held_out), len(channels), ["H"], maps, 1, 8)
        return spearman(readout(draw(1)), maps).mean().item()

    assert score([0, 1, 2, 3, 4, 5]) > 0.9
    assert abs(score([0, 1, 2, 3, 4])) < 0.15


def test_few_images_and_much_noise_ask_for_a_larger_penalty():
    noisy, clear = random_features(6, 200), random_features(200, 4)
    wary = solve(statistics_of(noisy, last_held_out(6, 3)), TARGETS, MAPS)
    assert min(wary.lam) > 1e-3
    sure = solve(statistics_of(clear, last_held_out(200, 50)), TARGETS, MAPS)
    assert sure.lam[0] < wary.lam[0]  # H, which channel 0 follows


@pytest.mark.parametrize("shift", [0, 5])  # of all features on the held-out images
def test_lambda_is_the_one_with_the_least_held_out_error(shift):
    features, held_out = random_features(8, 40), last_held_out(8, 4)
    features[4:] += shift * features.std((0, 2, 3), keepdim=True)
    statistics = statistics_of(features, held_out, 3)
    errors = torch.stack(
        [
            (F.conv2d(features[held_out], *dense(features[~held_out], 3, lam)) - F.adaptive_avg_pool2d(MAPS, 6))
            .square()
            .mean((0, 2, 3))
            for lam in LAMBDAS
        ]
    )
    assert solve(statistics, TARGETS, MAPS).lam == tuple(LAMBDAS[i] for i in errors.argmin(0))


@pytest.mark.parametrize("way", ["gram", "gradients"])
def test_constant_channels_do_no_harm(way):
    features, held_out = random_features(), torch.arange(20) % 4 == 1
    more = torch.cat([torch.full((20, 1, 8, 8), 0.1), features, torch.zeros(20, 1, 8, 8)], dim=1)
    more[:, 0] *= 1 + 1e-7 * torch.randn(20, 8, 8, generator=torch.Generator().manual_seed(0))  # float32's rounding

    def readout(x):
        if way == "gram":
            return solve(statistics_of(x, held_out, 3), TARGETS, MAPS, [1e-7])
        return solve_by_gradients(gradient_batches(x, held_out), x.shape[1], TARGETS, MAPS, 3, 8, [1e-7])

    without, with_constants = readout(features), readout(more)
    assert (with_constants.weight[:, [0, -1]] == 0).all()
    assert torch.allclose(with_constants(more), without(features), atol=1e-5)


@pytest.mark.parametrize("way", ["gram", "gradients"])
def test_a_blind_encoder_gets_a_constant_map(way):
    features, held_out = torch.full((6, 3, 8, 8), 0.3), last_held_out(6, 2)
    if way == "gram":
        readout = solve(statistics_of(features, held_out), TARGETS, MAPS)
    else:
        readout = solve_by_gradients(gradient_batches(features, held_out), 3, TARGETS, MAPS, 1, 8)
    expected = F.adaptive_avg_pool2d(MAPS, 8).mean((1, 2))
    assert torch.allclose(readout(features), expected[None, :, None, None].expand(6, 3, 32, 32), atol=1e-6)


def test_half_precision_training_and_features_are_summed_in_single_precision():
    features, held_out = random_features().half(), last_held_out(20, 5)
    single = statistics_of(features.float(), held_out, 3).compute()
    half = statistics_of(features, held_out, 3).compute()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = statistics_of(features.float(), held_out, 3).compute()
    assert all(torch.equal(half[name], single[name]) for name in single)
    assert all(torch.equal(mixed[name], single[name]) for name in single)


def test_the_readout_has_posenets_shapes_and_its_weights_travel_in_the_state():
    features = random_features()
    readout = solve(statistics_of(features, last_held_out(20, 5), 3), TARGETS, MAPS)
    assert readout.weight.shape == (3, 5, 3, 3)
    assert readout.predict_small(features).shape == (20, 3, 6, 6)
    assert readout(features).shape == (20, 3, 32, 32)
    assert (readout.kernel_size, readout.depth, readout.padding, readout.grid, readout.size) == (3, 1, 0, 8, (32, 32))
    copy = RidgeReadout(TARGETS, MAPS, torch.zeros(3, 5, 3, 3), torch.zeros(3), 8, readout.lam)
    copy.load_state_dict(readout.state_dict())
    assert torch.equal(copy(features), readout(features))


def test_the_gram_of_vgg16_fits_at_kernel_1_only():
    assert gram_gb(1472, 1) < GRAM_LIMIT_GB < gram_gb(1472, 3)
    gram = RidgeStatistics(6, 3, 8).gram
    assert gram_gb(6, 3) == gram.numel() * gram.element_size() / 1e9


def test_bad_input_is_named():
    features = random_features()
    fitted = torch.zeros(20, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"20 images to fit and 0 held out; both are needed.*mark some"):
        solve(statistics_of(features, fitted), TARGETS, MAPS)
    with pytest.raises(ValueError, match="0 images to fit and 20 held out"):
        solve_by_gradients(gradient_batches(features, ~fitted), 5, TARGETS, MAPS, 1, 8)
    with pytest.raises(ValueError, match="kernel_size is 2"):
        RidgeStatistics(5, 2, 8)
    with pytest.raises(ValueError, match="size 9 with padding 0 leave 0 cells of a grid of 8"):
        RidgeStatistics(5, 9, 8)
    with pytest.raises(ValueError, match=r"features are \(20, 5, 8, 8\); expected \(images, 4, 8, 8\)"):
        RidgeStatistics(4, 1, 8).update(features, fitted)
    with pytest.raises(ValueError, match=r"held_out is torch.float32 \(20,\)"):
        RidgeStatistics(5, 1, 8).update(features, fitted.float())
    marked = statistics_of(features, last_held_out(20, 5))
    with pytest.raises(ValueError, match=r"lambdas are \(0.0, 1.0\)"):
        solve(marked, TARGETS, MAPS, [0.0, 1.0])
    with pytest.raises(ValueError, match=r"maps are \(3, 32, 32\); expected \(2, height, width\)"):
        solve(marked, ["H", "V"], MAPS)
    features[3, 2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        solve(statistics_of(features, last_held_out(20, 5)), TARGETS, MAPS)
    with pytest.raises(ValueError, match="NaN or infinite"):
        solve_by_gradients(gradient_batches(features, torch.arange(20) == 3), 5, TARGETS, MAPS, 1, 8)
