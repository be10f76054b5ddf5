import functools

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from scipy.stats import spearmanr

from padprobe.callbacks.change import small_readout
from padprobe.callbacks.online import OnlinePosENet, OnlineRidge
from padprobe.maps import position_maps
from padprobe.readout.posenet import PosENet
from padprobe.readout.ridge import RidgeStatistics, solve

TARGETS = ["H", "G"]
GRID, SIZE = 8, 32


def features(n, seed=0):
    """Two channels that position shows in, through noise, and two that are noise."""
    noise = torch.randn(n, 4, GRID, GRID, generator=torch.Generator().manual_seed(seed))
    return noise + torch.cat([10 * position_maps(GRID, TARGETS), torch.zeros(2, GRID, GRID)])


def posenet(depth=1):
    return OnlinePosENet(PosENet(4, TARGETS, 3, depth, 0, GRID, SIZE), 0.1)


def ridge(forget=1.0):
    return OnlineRidge(TARGETS, position_maps(SIZE, TARGETS), 4, 1, GRID, forget)


MAKERS = {"posenet": posenet, "ridge": ridge, "deep": functools.partial(posenet, 2)}
SHARES = [[1, 2], [4, 2], [0, 4], [0, 0], [4, 4], [1, 1], [3, 8]] * 2


def learn(fabric, folder):
    """Steps on batches of which each process has its share: different in size, one of them empty."""
    readouts = {}
    for name, make in MAKERS.items():
        online = make()
        for step, shares in enumerate(SHARES):
            batch = features(sum(shares), step)
            part = batch if fabric.world_size == 1 else batch.split(shares)[fabric.global_rank]
            online.step(part if len(part) else None, late=step > 4)
        readouts[name] = online.current().state_dict()
    torch.save(readouts, folder / f"{fabric.world_size}-{fabric.global_rank}.pt")
    if dist.is_initialized():
        dist.barrier()


def test_two_processes_learn_what_one_learns_from_the_whole_batch(tmp_path):
    """Ridge holds out other images, so its penalty may be the next one. Hidden BatchNorms see a share alone: with them
    the processes agree, but not with one process."""
    for devices in (1, 2):
        fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp_spawn" if devices > 1 else "auto")
        fabric.launch(functools.partial(learn, folder=tmp_path))
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for kind, tolerance in (("posenet", 1e-5), ("ridge", 5e-3), ("deep", None)):
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), (kind, name)
            if tolerance:
                assert torch.allclose(value.float(), one[kind][name].float(), atol=tolerance), (kind, name)


def test_a_step_is_the_papers_sgd():
    """Against torch's own BatchNorm, loss at full size and SGD."""
    online, batches = posenet(), [features(5, seed) for seed in range(4)]
    plain = PosENet(4, TARGETS, 3, 1, 0, GRID, SIZE)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for i, batch in enumerate(batches):
        online.step(batch, late=i == 3)
        optimizer.param_groups[0]["lr"] = 0.01 if i == 3 else 0.1
        optimizer.zero_grad()
        (plain(batch) - plain.maps).square().mean((0, 2, 3)).sum().backward()
        optimizer.step()
    for ours, theirs in zip(online.readout.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_forgetting_weighs_a_batch_by_its_age():
    """With forget .5 a batch that is two batches old has a quarter of a new one's weight."""
    online, plain = ridge(0.5), RidgeStatistics(4, 1, GRID)
    old, new, held = features(4, 1), features(4, 2), features(1, 3)
    online.step(torch.cat([old, held]), False)
    online.step(None, False)
    online.step(torch.cat([new, held]), False)
    for part, times in ((old, 1), (new, 4)):
        for _ in range(times):
            plain.update(torch.cat([part, held]), torch.tensor([False] * 4 + [True]))
    expected = solve(plain, TARGETS, position_maps(SIZE, TARGETS))
    assert torch.allclose(online.current().weight, expected.weight, atol=1e-6)


@pytest.mark.parametrize("make", [posenet, ridge])
def test_its_state_goes_on_where_it_was(make):
    whole, first, second = make(), make(), make()
    for step in range(6):
        whole.step(features(6, step), False)
        (first if step < 3 else second).step(features(6, step), False)
        if step == 2:
            second.load_state_dict(first.state_dict())
    expected, state = whole.current().state_dict(), second.current().state_dict()
    assert all(torch.equal(expected[name], state[name]) for name in expected)


@pytest.mark.parametrize("make", [posenet, ridge])
def test_nothing_is_made_of_nothing(make):
    assert make().current() is None
    online = make()
    online.step(features(1), False)
    assert (online.current() is None) == (make is ridge)  # of one image none is held out


def test_the_small_readout_reads_position_where_it_is():
    maps = position_maps(SIZE, TARGETS)
    assert small_readout(features(16), maps).mean(0).gt(0.8).all()
    assert small_readout(torch.randn(16, 4, GRID, GRID), maps).mean(0).abs().lt(0.2).all()


def test_the_small_readout_scores_images_that_it_was_not_made_on():
    """Eight images in which every cell is told by its own channel in one half only: nothing carries over."""
    own = torch.eye(GRID**2).reshape(GRID**2, GRID, GRID)
    first, second = torch.cat([own, 0 * own]), torch.cat([0 * own, own])
    images = torch.stack([first] * 4 + [second] * 4)
    maps = position_maps(SIZE, TARGETS)
    assert small_readout(images, maps).abs().max() < 1e-6
    same = small_readout(torch.stack([first] * 8), maps).mean(0)
    up = torch.nn.functional.interpolate(
        torch.nn.functional.adaptive_avg_pool2d(maps, GRID)[None], size=SIZE, mode="bilinear"
    )[0]
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(up, maps, strict=True)]
    assert same.tolist() == pytest.approx(expected, abs=1e-3)
