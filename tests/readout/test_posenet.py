import pytest
import torch
import torch.nn.functional as F

from padprobe import PosENet
from padprobe.maps import TARGETS
from padprobe.probe.features import FeatureCache
from padprobe.probe.train import train_readouts
from padprobe.readout.posenet import make_optimizer


def cached(features: torch.Tensor) -> FeatureCache:
    cache = FeatureCache(len(features), features.shape[1], features.shape[2], 8.0, None, torch.device("cpu"))
    cache.write(torch.arange(len(features)), features)
    return cache


def literal(readout: PosENet, features: torch.Tensor) -> torch.Tensor:
    """The paper's readout in plain torch layers, upsampled to full size: (B, T, H, W)."""
    maps = []
    for t, hidden in enumerate(readout.hidden):
        raw = F.conv2d(hidden(features), readout.weight[t : t + 1], readout.bias[t : t + 1], padding=readout.padding)
        weight, bias = readout.norm.weight[t : t + 1], readout.norm.bias[t : t + 1]
        normed = F.batch_norm(raw, None, None, weight, bias, training=True)
        maps.append(F.interpolate(normed.sigmoid(), readout.size, mode="bilinear", align_corners=False))
    return torch.cat(maps, dim=1)


@pytest.mark.parametrize(
    ("kernel_size", "depth", "padding", "size"),
    [(3, 1, 0, 224), (1, 1, 0, 96), (7, 1, 2, (61, 40)), (3, 3, 0, (30, 64)), (3, 2, 1, 64)],
)
def test_loss_and_gradient_are_those_of_the_literal_readout(kernel_size, depth, padding, size):
    torch.manual_seed(0)
    features = torch.rand(4, 12, 28, 28)
    readout = PosENet(12, TARGETS, kernel_size, depth, padding, size=size)
    torch.nn.init.normal_(readout.bias)
    loss = readout.loss(features)
    expected = (literal(readout, features) - readout.maps).square().mean((0, 2, 3))
    assert torch.allclose(loss, expected, atol=1e-6)
    ours = torch.autograd.grad(loss.sum(), list(readout.parameters()))
    theirs = torch.autograd.grad(expected.sum(), list(readout.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_the_paper_readout_has_the_papers_shapes():
    readout = PosENet(1472)
    assert readout.weight.shape == (5, 1472, 3, 3)
    assert readout.predict_small(torch.rand(2, 1472, 28, 28)).shape == (2, 5, 26, 26)
    maps = readout(torch.rand(2, 1472, 28, 28))
    assert maps.shape == (2, 5, 224, 224)
    assert 0 <= maps.min() <= maps.max() <= 1
    bound = (6 / (1472 * 9 + 9)) ** 0.5  # Xavier uniform for one output channel
    assert 0.99 * bound < readout.weight.abs().max() <= bound


def trained(targets, depth=1, seed=0):
    features = torch.rand(20, 6, 12, 12, generator=torch.Generator().manual_seed(1))
    readout = PosENet(6, targets, depth=depth, grid=12, size=24, seed=seed)
    train_readouts({"all": readout}, cached(features), lambda key, batch: batch, epochs=2, batch_size=8)
    return dict(zip(targets, readout(features).unbind(1), strict=True))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_further_target_changes_no_other_targets_result(depth):
    alone, together = trained(["G"], depth), trained(["H", "VS", "G"], depth)
    assert torch.allclose(alone["G"], together["G"], atol=1e-5)
    assert not torch.allclose(trained(["G"], depth, seed=1)["G"], alone["G"], atol=1e-3)


def test_one_more_readout_changes_no_other_readouts_result():
    features = torch.rand(20, 6, 12, 12, generator=torch.Generator().manual_seed(1))

    def train(*kernel_sizes):
        readouts = {k: PosENet(6, ["G"], k, grid=12, size=24) for k in kernel_sizes}
        train_readouts(readouts, cached(features), lambda key, batch: batch, epochs=2, batch_size=8)
        return readouts[3](features)

    assert torch.equal(train(3), train(5, 3, 1))


def test_training_is_the_literal_loop():
    """Plain torch layers, upsampled to full size, torch's SGD: the same predictions after some epochs."""
    features = torch.rand(24, 5, 12, 12, generator=torch.Generator().manual_seed(2)).half().float()
    readout = PosENet(5, ["H", "VS"], grid=12, size=24)
    networks = []
    for t in range(2):
        conv, norm = torch.nn.Conv2d(5, 1, 3), torch.nn.BatchNorm2d(1)
        conv.weight.data.copy_(readout.weight[t : t + 1])
        conv.bias.data.zero_()
        up = torch.nn.Upsample(24, mode="bilinear", align_corners=False)
        networks.append(torch.nn.Sequential(conv, norm, torch.nn.Sigmoid(), up))
    train_readouts({0: readout}, cached(features), lambda key, batch: batch, epochs=6, batch_size=8, seed=3)

    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(24, generator=generator) for _ in range(6)]
    for t, network in enumerate(networks):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        for epoch, order in enumerate(orders):
            optimizer.param_groups[0]["lr"] = 0.1 if epoch < 4 else 0.01
            for batch in order.split(8):
                optimizer.zero_grad()
                (network(features[batch])[:, 0] - readout.maps[t]).square().mean().backward()
                optimizer.step()
        with torch.no_grad():
            assert torch.allclose(network.eval()(features)[:, 0], readout(features)[:, t], atol=1e-4)


def test_the_papers_scale_asks_for_stripes_on_minus_one_to_one():
    assert PosENet(3, scale="paper").maps.amin((1, 2)).tolist() == [0, 0, 0, -1, -1]


def test_building_a_readout_draws_no_global_random_number():
    before = torch.get_rng_state()
    PosENet(4, depth=3)
    assert torch.equal(before, torch.get_rng_state())


def test_training_finds_a_position_signal_and_only_where_there_is_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 16).expand(16, 16)
    noise = torch.randn(64, 3, 16, 16, generator=generator)
    with_signal = torch.cat([noise, x + 0.3 * torch.randn(64, 1, 16, 16, generator=generator)], dim=1)
    readouts = {name: PosENet(c, ["H"], grid=16, size=32) for name, c in (("all", 4), ("rgb", 3))}
    train_readouts(readouts, cached(with_signal), lambda key, batch: batch if key == "all" else batch[:, :3], epochs=60)
    from padprobe import spearman

    def score(name, features):
        return spearman(readouts[name](features), readouts[name].maps).mean().item()

    assert score("all", with_signal) > 0.8
    assert abs(score("rgb", noise)) < 0.05


def test_the_optimizer_is_the_papers():
    group = make_optimizer(PosENet(3)).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 1e-4)


def test_impossible_readouts_are_named():
    with pytest.raises(ValueError, match="kernel_size is 4"):
        PosENet(3, kernel_size=4)
    with pytest.raises(ValueError, match="leave -2 cells of a grid of 10"):
        PosENet(3, kernel_size=7, depth=2, grid=10)
    with pytest.raises(ValueError, match="unknown target 'D'"):
        PosENet(3, targets=["D"])
