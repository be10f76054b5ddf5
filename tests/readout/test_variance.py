import itertools

import pytest
import torch

from padprobe.readout.variance import GROUPS, PositionVariance


def measured(features, index):
    metric = PositionVariance(features.shape[1], features.shape[2])
    metric.update(features, index)
    return metric


def test_over_all_splits_it_is_the_variance_component_of_a_two_way_decomposition():
    """f = mean + image + position + residual, with one value a cell: the expected mean square of position is
    (images) x (its variance component) + the residual's."""
    generator = torch.Generator().manual_seed(0)
    n, cells = 6, 16
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
        for half in itertools.combinations(range(n), n // 2):
            metric = measured(features, torch.tensor([int(i in half) for i in range(n)]))
            found.append(metric.eta_squared(slice(c, c + 1)).mean() * table.var(correction=0))
        # the mean over cells divides by them all, the component by one less
        assert torch.stack(found).mean() == pytest.approx((component * (cells - 1) / cells).item(), rel=1e-5)


def test_noise_is_not_explained_and_a_map_that_every_image_shares_is():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(64, 3, 8, 8, generator=generator)
    ramp = torch.linspace(-1, 1, 8).expand(8, 8)
    ramp = ramp / ramp.std(correction=0)
    features = torch.cat([noise[:, :1], noise[:, 1:2] + ramp, ramp.expand(64, 1, 8, 8), torch.ones(64, 1, 8, 8)], dim=1)
    metric = measured(features, torch.arange(64))
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


def test_the_interval_holds_the_true_share_as_often_as_it_says():
    generator = torch.Generator().manual_seed(4)
    ramp = torch.linspace(-1, 1, 6).expand(6, 6)
    truth = ramp.var(correction=0) / (ramp.var(correction=0) + 1)
    held = 0
    for _ in range(100):
        features = ramp + torch.randn(40, 1, 6, 6, generator=generator)
        low, high = measured(features, torch.arange(40)).interval()
        held += low <= truth <= high
    assert 85 <= held <= 99
    assert all(bound != bound for bound in measured(features[:15], torch.arange(15)).interval())


def test_batches_order_and_processes_change_nothing():
    features = torch.rand(40, 2, 5, 5, generator=torch.Generator().manual_seed(2)) + 10
    whole = measured(features, torch.arange(40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    first, second = PositionVariance(2, 5), PositionVariance(2, 5)
    for batch in order[:19].split(2):
        first.update(features[batch], batch)
    second.update(features[order[19:]], order[19:])
    for name in ("sums", "squares", "images"):  # as torchmetrics does between processes
        assert first._reductions[name].__name__ == "dim_zero_sum"
        setattr(first, name, getattr(first, name) + getattr(second, name))
    assert torch.allclose(whole.eta_squared(), first.eta_squared(), rtol=1e-7, atol=1e-9)
    assert whole.interval() == pytest.approx(first.interval(), rel=1e-6)


def test_a_half_without_images_is_named():
    with pytest.raises(ValueError, match=r"have \[3, 0\] images"):
        measured(torch.rand(3, 1, 4, 4), torch.arange(0, 6, 2)).eta_squared()
    assert GROUPS % 2 == 0
