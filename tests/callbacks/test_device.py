"""On a GPU nothing mixes devices, and no step waits for the device. Fake tensors show both without a GPU."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from padprobe.callbacks.change import small_readout
from padprobe.callbacks.logs import MeanMaps, TroubleCounter
from padprobe.callbacks.online import OnlinePosENet, OnlineRidge, OnlineScores
from padprobe.maps import position_maps
from padprobe.network.tap import StageTap
from padprobe.readout.posenet import PosENet

TARGETS, GRID, SIZE = ["H", "G"], 8, (24, 32)


def fake(value, mode):
    with mode:
        return mode.from_tensor(value.detach()).to("cuda")


def move(module, mode):
    """Puts a module on the fake GPU; `Module.to` cannot."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(fake(value, mode)))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, fake(value, mode))
    return module


def posenet(mode):
    return OnlinePosENet(move(PosENet(24, TARGETS, 3, 2, 0, GRID, SIZE), mode), 0.1)


def ridge(mode):
    online = OnlineRidge(TARGETS, position_maps(SIZE, TARGETS), 24, 1, GRID, 0.99)
    for name in online.STATES:
        setattr(online.statistics, name, fake(getattr(online.statistics, name), mode))
    return online


@pytest.mark.parametrize("make", [posenet, ridge])
def test_no_step_reads_a_value_or_mixes_devices(make, monkeypatch):
    """Backward passes need a driver, so gradients are zeros."""

    def backward(loss):
        for parameter in online.readout.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    encoder = move(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3)), mode)
    online, scores = make(mode), move(OnlineScores(position_maps(SIZE, TARGETS)), mode)
    readout = move(PosENet(24, TARGETS, 3, 1, 0, GRID, SIZE), mode)
    tap, trouble, mean_maps = StageTap(encoder, ["1", "2"], GRID, layout="auto"), TroubleCounter(), MeanMaps()
    with mode:
        for size in (SIZE, (36, 20)):
            encoder(torch.rand(8, 3, *size, device="cuda"))
            features = tap.take()
            usable = features.abs() <= 1e4
            trouble.add_batch(usable)
            features.masked_fill_(~usable, 0.0)
            online.step(features, late=False)
            start = small_readout(features, scores.target)
            prediction = readout(features)
            scores.update(prediction, views=2)
            mean_maps.add(prediction, scores.target)
        assert {value.device.type for value in (features, start, *scores.per_image().values())} == {"cuda"}
        assert scores.per_image()["spc"].shape == (8, 2)


def test_fake_tensors_do_show_it():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.rand(3, device="cuda").sum().item()
