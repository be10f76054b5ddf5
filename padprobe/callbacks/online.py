"""Readouts that learn while a network trains, batch by batch, in any number of processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from padprobe.processes import images_per_process, several_processes
from padprobe.readout.posenet import PosENet, make_optimizer
from padprobe.readout.ridge import RidgeReadout, RidgeStatistics, solve, solve_by_gradients
from padprobe.scores import score_maps


class OnlinePosENet:
    """The paper's readout, trained on the host's batches as they come.

    With several processes it is the same in all of them, and the same as that of one process that sees the whole batch:
    the output of the convolutions (a few numbers per cell) is gathered before BatchNorm, and the gradients of the
    weights are summed. The hidden BatchNorms of deeper readouts see only the images of their process; their running
    statistics are averaged before the readout is used.

    Example:
        >>> online = OnlinePosENet(PosENet(in_channels=8, grid=14, size=28), lr=0.1)
        >>> online.step(torch.rand(4, 8, 14, 14), late=False)
        >>> online.current()(torch.rand(2, 8, 14, 14)).shape
        torch.Size([2, 5, 28, 28])
    """

    def __init__(self, readout: PosENet, lr: float) -> None:
        self.readout, self.lr = readout, lr
        self.optimizer = make_optimizer(readout, lr)
        self.steps = 0

    def step(self, features: Tensor | None, late: bool) -> None:
        """Learns from a batch. All processes must call it equally often.

        Args:
            features: (B, C, grid, grid), or None if this process has no images.
            late: whether the last third of the training has begun; its learning rate is a tenth.
        """
        images = 0 if features is None else len(features)
        counts = images_per_process(images) if several_processes() else [images]
        if not any(counts):
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr / 10 if late else self.lr
        self.readout.train()
        self.optimizer.zero_grad()
        with torch.enable_grad():
            if len(counts) > 1:
                self._backward_together(features, counts)
            else:
                assert features is not None
                self.readout.loss(features).sum().backward()
        self.optimizer.step()
        self.steps += 1

    def _backward_together(self, features: Tensor | None, counts: list[int]) -> None:
        """Computes, in each process, the gradients of the loss on the images of all processes."""
        readout, rank = self.readout, dist.get_rank()
        side = readout.gram.shape[0]
        raw = None if features is None else readout.raw(features)
        block = readout.weight.new_zeros(max(counts), len(readout.targets), side, side)
        if raw is not None:
            block[: len(raw)] = raw.detach()
        blocks = [torch.empty_like(block) for _ in counts]
        dist.all_gather(blocks, block)
        raws = torch.cat([part[:count] for part, count in zip(blocks, counts, strict=True)]).requires_grad_()
        readout.errors(torch.sigmoid(readout.norm(raws))).mean(0).sum().backward()
        if raw is not None:
            assert raws.grad is not None
            raw.backward(raws.grad.split(counts)[rank])
        complete = set(readout.norm.parameters())  # these gradients are those of all images already
        for parameter in readout.parameters():
            if parameter not in complete:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def current(self) -> PosENet | None:
        """The readout as it is now, in evaluation mode, or None before the first step. All processes must call it."""
        if not self.steps:
            return None
        if several_processes():
            for value in self.readout.hidden.buffers():
                total = value.double()
                dist.all_reduce(total)
                value.copy_(total / dist.get_world_size())
        return self.readout.eval()

    def to(self, device: torch.device) -> None:
        """Moves the weights and the momenta to a device."""
        self.readout.to(device)
        for state in self.optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].to(device)

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain tensors and numbers."""
        momenta = [self.optimizer.state[p]["momentum_buffer"] for p in self.readout.parameters()] if self.steps else []
        return {"readout": dict(self.readout.state_dict()), "momenta": momenta, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.readout.load_state_dict(state["readout"])
        self.steps = state["steps"]
        for parameter, momentum in zip(self.readout.parameters(), state["momenta"], strict=bool(self.steps)):
            self.optimizer.state[parameter]["momentum_buffer"] = momentum.clone().to(parameter.device)


class OnlineRidge:
    """The closed-form readout of the host's recent batches, without an optimizer or a learning rate.

    A batch's statistics enter with weight 1 and lose weight with each later batch. So the readout describes the network
    as it is now. Every fifth image helps to choose the penalty.

    With several processes, each gathers statistics of its own images. :meth:`current` sums them on process 0, whose
    state goes into a checkpoint. A checkpoint therefore lacks the batches that other processes saw after that.

    Args:
        targets, maps: names of the maps, and the maps, (T, size, size).
        in_channels, kernel_size, grid: see :class:`~padprobe.readout.ridge.RidgeStatistics`.
        forget: decay per batch, in (0, 1]: 0.99 remembers about 100 batches.
    """

    STATES = ("gram", "sums", "images")

    def __init__(
        self, targets: Sequence[str], maps: Tensor, in_channels: int, kernel_size: int, grid: int, forget: float
    ) -> None:
        self.targets, self.maps, self.forget = targets, maps, forget
        self.statistics = RidgeStatistics(in_channels, kernel_size, grid)
        self.steps = 0
        self._seen = 0  # images in this process

    def step(self, features: Tensor | None, late: bool) -> None:
        """Adds a batch (B, C, grid, grid), or None if this process has no images. ``late`` changes nothing."""
        statistics = self.statistics
        for name in self.STATES:
            getattr(statistics, name).mul_(self.forget)
        if features is None:
            features = torch.zeros(0, statistics.in_channels, statistics.grid, statistics.grid)
        index = torch.arange(self._seen, self._seen + len(features))
        statistics.update(features, index % 5 == 4)
        self._seen += len(features)
        self.steps += 1

    def current(self) -> RidgeReadout | None:
        """The readout of the statistics so far. All processes must call it.

        None before the first step, and as long as there are no images to fit or none to choose the penalty on.
        """
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
        """Moves the statistics to a device."""
        self.statistics.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain tensors and numbers."""
        state = {name: getattr(self.statistics, name) for name in self.STATES}
        return {**state, "seen": self._seen, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.reset()  # otherwise torchmetrics returns the result that it has cached
        self.step(None, late=False)
        self._seen, self.steps = state["seen"], state["steps"]
        first = not several_processes() or dist.get_rank() == 0
        for name in self.STATES:
            value = getattr(self.statistics, name)
            value.copy_(state[name]) if first else value.zero_()


def small_readout(features: Tensor, targets: Sequence[str], maps: Tensor) -> Tensor:
    """SPC of a small readout on a few images: (T,), means over images.

    A 1 x 1 ridge readout is fitted on each half of the images and scored on the other half. The images are too few for
    a score to report, but the same measurement before and after a training shows what the training changed.
    ``features`` are (B, C, grid, grid), B at least 4; ``maps`` (T, size, size).

    Example:
        >>> maps = torch.linspace(0, 1, 28).expand(1, 28, 28)
        >>> features = torch.linspace(0, 1, 14).expand(8, 1, 14, 14)  # position itself
        >>> small_readout(features, ["H"], maps) > 0.99
        tensor([True])
    """
    index, scores = torch.arange(len(features)), []
    channels, grid, device = features.shape[1], features.shape[-1], features.device
    for half in (0, 1):
        fitted, scored = features[index % 2 == half], features[index % 2 != half]
        batches = functools.partial(itertools.repeat, (fitted, torch.arange(len(fitted)) % 4 == 1), 1)
        readout = solve_by_gradients(batches, channels, targets, maps, 1, grid, iterations=15, device=device)
        with torch.no_grad():
            scores.append(score_maps(readout(scored), maps)["spc"])
    return torch.cat(scores).mean(0)
