import itertools

import pytest
import torch

from padprobe.readout.variance import GROUPS, PositionVariance


def measured(features, index=None, images=None):
    metric = PositionVariance(features.shape[1], features.shape[2], images=images or len(features))
    metric.update(features, torch.arange(len(features)) if index is None else index)
    return metric


def test_over_all_orders_it_is_the_variance_component_of_a_two_way_decomposition():
    """f = mean + image + position + residual, with one value a cell: the expected mean square of position is
    (images) x (its variance component) + the residual's."""
    generator = torch.Generator().manual_seed(0)
    n, cells = 4, 16
    position = torch.randn(1, 2, 4, 4, generator=generator)
    features = 3 + position + torch.randn(n, 2, 4, 4, generator=generator)
    features = features + torch.randn(n, 2, 1, 1, generator=generator)
    f = features.double().flatten(2)
    for c in range(2):
        table = f[:, c]
        of_image, of_cell, mean = table.mean(1, keepdim=True), table.mean(0, keepdim=True), table.mean()
        between = n * (of_cell - mean).square().sum() / (cells - 1)
        residual = (table - of_image - of_cell + mean).square().sum() / ((n - 1) * (cells - 1))
        component = (between - residual) / n
        found = []
        for order in itertools.permutations(range(n)):
            metric = measured(features[list(order)])
            found.append(metric.eta_squared(slice(c, c + 1)).mean() * table.var(correction=0))
        # the mean over cells divides by them all, the component by one less
        assert torch.stack(found).mean() == pytest.approx((component * (cells - 1) / cells).item(), rel=1e-5)


def test_noise_is_not_explained_and_a_map_that_every_image_shares_is():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(64, 3, 8, 8, generator=generator)
    ramp = torch.linspace(-1, 1, 8).expand(8, 8)
    ramp = ramp / ramp.std(correction=0)
    features = torch.cat([noise[:, :1], noise[:, 1:2] + ramp, ramp.expand(64, 1, 8, 8), torch.ones(64, 1, 8, 8)], dim=1)
    metric = measured(features)
    eta2 = [metric.eta_squared(slice(i, i + 1)).mean().item() for i in range(4)]
    assert eta2[0] == pytest.approx(0, abs=0.05)
    assert eta2[1] == pytest.approx(0.5, abs=0.05)
    assert eta2[2] == pytest.approx(1)
    assert eta2[3] == 0
    assert torch.allclose(metric.signal(), features.double().mean(0))
    variance = features.double().transpose(0, 1).flatten(1).var(1, correction=0)
    both = metric.eta_squared()
    assert both.shape == (8, 8)
    assert both.mean() == pytest.approx(
        (sum(e * v for e, v in zip(eta2, variance, strict=True)) / variance.sum()).item()
    )


def drawn(rng, distinct, copies, share):
    """Features of images (distinct * copies, 1, 5, 5) of which position explains a share, copies in a row."""
    ramp = torch.linspace(-1, 1, 5).expand(5, 5)
    noise = torch.randn(distinct, 1, 5, 5, generator=rng) + 0.5 * torch.randn(distinct, 1, 1, 1, generator=rng)
    signal = ramp / ramp.std(correction=0) * (1.25 * share / (1 - share)) ** 0.5
    return (signal + noise).repeat_interleave(copies, 0)


@pytest.mark.parametrize(("distinct", "copies"), [(40, 10), (33, 10), (200, 1), (20, 1), (10, 1)])
def test_the_interval_holds_the_true_share_as_often_as_it_says(distinct, copies):
    """Also with ten copies of each image, which the blocks cut in two. The sums of blocks are drawn directly."""
    generator = torch.Generator().manual_seed(4)
    n, runs, share = distinct * copies, 2000, 0.3
    block = torch.arange(n) * GROUPS // n
    counts = torch.zeros(GROUPS, distinct).index_put_(
        (block, torch.arange(n) // copies), torch.ones(()), accumulate=True
    )
    metric, held = PositionVariance(1, 5, images=n), 0
    for _ in range(runs):
        images = drawn(generator, distinct, 1, share).double()
        metric.sums = (counts.double() @ images.flatten(1)).view(GROUPS, 1, 5, 5)
        metric.squares = counts.double() @ images.square().sum((2, 3))
        metric.images, metric._computed = counts.double().sum(1), None
        low, high = metric.interval()
        held += low <= share <= high
    assert 0.93 <= held / runs <= 0.97
    direct = measured(images.float().repeat_interleave(copies, 0))  # these are the states that images give
    assert torch.allclose(direct.sums, metric.sums, atol=1e-4)
    assert torch.allclose(direct.squares, metric.squares, rtol=1e-5)


def test_copies_of_images_are_not_taken_for_position():
    generator = torch.Generator().manual_seed(5)
    metrics = [measured(drawn(generator, 23, 10, 0.0)) for _ in range(200)]
    values = torch.stack([metric.eta_squared().mean() for metric in metrics])
    assert values.mean().abs() < 3 * values.std() / 200**0.5 < 0.004
    assert sum(low <= 0 <= high for low, high in (metric.interval() for metric in metrics)) >= 186


def test_an_interval_needs_ten_images():
    features = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(6))
    low, high = measured(features).interval()
    assert low < high
    for n in (2, 3, 9):
        assert measured(features[:n]).eta_squared().isfinite().all()
        assert all(end != end for end in measured(features[:n]).interval())


def test_batches_order_and_processes_change_nothing():
    features = torch.rand(40, 2, 5, 5, generator=torch.Generator().manual_seed(2)) + 10
    whole = measured(features)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    first, second = (PositionVariance(2, 5, images=40) for _ in range(2))
    for batch in order[:19].split(2):
        first.update(features[batch], batch)
    second.update(features[order[19:]], order[19:])
    for name in ("sums", "squares", "images"):  # as torchmetrics does between processes
        assert first._reductions[name].__name__ == "dim_zero_sum"
        setattr(first, name, getattr(first, name) + getattr(second, name))
    assert torch.allclose(whole.eta_squared(), first.eta_squared(), rtol=1e-7, atol=1e-9)
    assert whole.interval() == pytest.approx(first.interval(), rel=1e-6)


def test_blocks_without_images_are_named():
    with pytest.raises(ValueError, match=r"have \[3, 0, .* not neighbours"):
        measured(torch.rand(3, 1, 4, 4), images=40).eta_squared()


def test_a_large_constant_hides_no_variance():
    generator = torch.Generator().manual_seed(0)
    ramp = 0.02 * torch.linspace(-1, 1, 8)
    features = 0.01 * torch.randn(20, 4, 8, 8, generator=generator) + ramp
    constant = torch.full((20, 1, 8, 8), 300.7)
    alone = measured(features).eta_squared().mean()
    assert measured(torch.cat([features, constant], 1)).eta_squared().mean() == pytest.approx(alone.item(), abs=1e-4)
