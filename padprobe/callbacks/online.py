"""Readouts that are made while a network trains, batch by batch, in any number of processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from padprobe.processes import several_processes, shares
from padprobe.readout.posenet import PosENet, make_optimizer
from padprobe.readout.ridge import RidgeReadout, RidgeStatistics, solve, solve_by_gradients
from padprobe.scores import score_maps


class OnlinePosENet:
    """The paper's readout, trained on a host's batches as they come.

    In several processes it is the same in all of them, and what one process would have that saw the whole batch: what
    the convolutions give (a few numbers a cell) is gathered before BatchNorm, and the weights' gradients are summed.
    The hidden BatchNorms of deeper readouts see their own process's images; their running statistics are averaged
    before the readout is used.

    Args:
        readout: to train, in place.
        lr: learning rate.
    """

    def __init__(self, readout: PosENet, lr: float) -> None:
        self.readout, self.lr = readout, lr
        self.optimizer = make_optimizer(readout, lr)
        self.steps = 0

    def step(self, features: Tensor | None, late: bool) -> None:
        """Learns from a batch (B, C, grid, grid); None where this process has none.

        ``late``: the last third of the training, at a tenth of the rate. All processes must call it equally often.
        """
        images = 0 if features is None else len(features)
        shared = shares(images) if several_processes() else [images]
        if not any(shared):
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr / 10 if late else self.lr
        self.readout.train()
        self.optimizer.zero_grad()
        with torch.enable_grad():
            if len(shared) > 1:
                self._backward_together(features, shared)
            else:
                assert features is not None
                self.readout.loss(features).sum().backward()
        self.optimizer.step()
        self.steps += 1

    def _backward_together(self, features: Tensor | None, shared: list[int]) -> None:
        """The gradients of the loss on all processes' images, in each of them."""
        readout, rank, room = self.readout, dist.get_rank(), max(shared)
        side = readout.gram.shape[0]
        own = readout.weight.new_zeros(room, len(readout.targets), side, side)
        raw = None if features is None else readout.raw(features)
        if raw is not None:
            own[: len(raw)] = raw.detach()
        parts = [torch.empty_like(own) for _ in shared]
        dist.all_gather(parts, own)
        raws = torch.cat([part[:share] for part, share in zip(parts, shared, strict=True)]).requires_grad_()
        readout.errors(torch.sigmoid(readout.norm(raws))).mean(0).sum().backward()
        if raw is not None:
            assert raws.grad is not None
            raw.backward(raws.grad.split(shared)[rank])
        for name, parameter in readout.named_parameters():
            if not name.startswith("norm."):  # those gradients are of all images already
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def made(self) -> PosENet | None:
        """The readout as it is now, in evaluation mode; None before the first step. To be called in all processes."""
        if not self.steps:
            return None
        if several_processes():
            for name, value in self.readout.named_buffers():
                if name.startswith("hidden."):
                    total = value.double()
                    dist.all_reduce(total)
                    value.copy_(total / dist.get_world_size())
        return self.readout.eval()

    def to(self, device: torch.device) -> None:
        """Moves weights and momenta."""
        self.readout.to(device)
        for state in self.optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].to(device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers alone."""
        momenta = [self.optimizer.state[p]["momentum_buffer"] for p in self.readout.parameters()] if self.steps else []
        return {"readout": dict(self.readout.state_dict()), "momenta": momenta, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.readout.load_state_dict(state["readout"])
        self.steps = state["steps"]
        for parameter, momentum in zip(self.readout.parameters(), state["momenta"], strict=bool(self.steps)):
            self.optimizer.state[parameter]["momentum_buffer"] = momentum.clone().to(parameter.device)


class OnlineRidge:
    """The closed-form readout of a host's recent batches: no optimizer, no learning rate.

    Every batch's statistics enter with weight 1 and fade by ``forget`` with each later batch, so that the readout is of
    the network as it is now: .99 remembers about the last 100 batches. Every fifth image chooses the penalty.

    Processes gather their statistics of their own; :meth:`made` sums them up on the first, whose state is that of a
    checkpoint: batches that other processes saw since then are not in it.

    Args:
        targets: their names.
        maps: (T, size, size).
        in_channels, kernel_size, grid: see :class:`~padprobe.readout.ridge.RidgeStatistics`.
        forget: in (0, 1].
    """

    STATES = ("gram", "sums", "images")

    def __init__(
        self, targets: Sequence[str], maps: Tensor, in_channels: int, kernel_size: int, grid: int, forget: float
    ) -> None:
        self.targets, self.maps, self.forget = targets, maps, forget
        self.statistics = RidgeStatistics(in_channels, kernel_size, grid)
        self.steps = 0
        self._seen = 0  # images, of this process

    def step(self, features: Tensor | None, late: bool) -> None:
        """Adds a batch (B, C, grid, grid); None where this process has none."""
        statistics = self.statistics
        for name in self.STATES:
            getattr(statistics, name).mul_(self.forget)
        if features is None:
            features = torch.zeros(0, statistics.in_channels, statistics.grid, statistics.grid)
        index = torch.arange(self._seen, self._seen + len(features))
        statistics.update(features, index % 5 == 4)
        self._seen += len(features)
        self.steps += 1

    def made(self) -> RidgeReadout | None:
        """The readout of the statistics so far; None without images to fit and to choose the penalty on. To be called
        in all processes."""
        if not self.steps:
            return None
        state = self.statistics.compute()
        if several_processes():
            for name in self.STATES:
                value = state[name] if dist.get_rank() == 0 else torch.zeros_like(state[name])
                setattr(self.statistics, name, value)
        if not state["images"].gt(0).all():
            return None
        return solve(self.statistics, self.targets, self.maps)

    def to(self, device: torch.device) -> None:
        self.statistics.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers alone."""
        state = {name: getattr(self.statistics, name) for name in self.STATES}
        return {**state, "seen": self._seen, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.reset()  # or torchmetrics would hand out what it computed before
        self.step(None, late=False)
        self._seen, self.steps = state["seen"], state["steps"]
        first = not several_processes() or dist.get_rank() == 0
        for name in self.STATES:
            mine = getattr(self.statistics, name)
            mine.copy_(state[name]) if first else mine.zero_()


def small_readout(features: Tensor, targets: Sequence[str], maps: Tensor) -> Tensor:
    """SPC of ridge readouts (1x1) of each half of a few images on the other half: (T,), means over images.

    Too few images for a score to report, but the same few before and after a training show what the training changed.

    Args:
        features: (B, C, grid, grid), B at least 4.
        targets: names of the maps.
        maps: (T, size, size).
    """
    index, scores = torch.arange(len(features)), []
    for half in (0, 1):
        mine, others = features[index % 2 == half], features[index % 2 != half]
        held_out = torch.arange(len(mine)) % 4 == 1
        readout = solve_by_gradients(
            functools.partial(itertools.repeat, (mine, held_out), 1),
            mine.shape[1],
            targets,
            maps,
            kernel_size=1,
            grid=mine.shape[-1],
            iterations=15,
            device=mine.device,
        )
        with torch.no_grad():
            scores.append(score_maps(readout(others), maps)["spc"])
    return torch.cat(scores).mean(0)
