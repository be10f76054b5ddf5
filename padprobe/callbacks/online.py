"""Readouts that learn while a network trains, batch by batch, in any number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from padprobe.processes import images_per_process, several_processes
from padprobe.readout.posenet import PosENet, make_optimizer
from padprobe.readout.ridge import RidgeReadout, RidgeStatistics, solve
from padprobe.scores import PositionScores, constant_error, is_constant, mean_absolute_error, standard_ranks


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
        side = readout.side
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
    as it is now. The last fifth of each batch chooses the penalty: neighbours may be video frames that are alike.

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

    def step(self, features: Tensor | None, late: bool) -> None:
        """Adds a batch (B, C, grid, grid), or None if this process has no images. ``late`` changes nothing."""
        statistics = self.statistics
        for name in self.STATES:
            getattr(statistics, name).mul_(self.forget)
        if features is None:
            features = torch.zeros(0, statistics.in_channels, statistics.grid, statistics.grid)
        n = len(features)
        held_out = max(1, n // 5) if n > 1 else n * (self.steps % 5 == 1)
        statistics.update(features, [i >= n - held_out for i in range(n)])
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
        return {**state, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.reset()  # otherwise torchmetrics returns the result that it has cached
        self.step(None, late=False)
        self.steps = state["steps"]
        first = not several_processes() or dist.get_rank() == 0
        for name in self.STATES:
            value = getattr(self.statistics, name)
            value.copy_(state[name]) if first else value.zero_()


def make_online(in_channels: int, maps: Tensor, options: Mapping[str, Any]) -> OnlinePosENet | OnlineRidge:
    """A new readout of the maps (T, H, W), with the callback's options.

    Example:
        >>> shape = {"kernel_size": 1, "depth": 1, "padding": 0, "grid": 8}
        >>> options = {"readout": "ridge", "targets": ["H"], "forget": 0.9, "lr": 0.1, "seed": 0, **shape}
        >>> type(make_online(4, torch.rand(1, 16, 24), options)).__name__
        'OnlineRidge'
    """
    o = options
    if o["readout"] == "ridge":
        return OnlineRidge(o["targets"], maps, in_channels, o["kernel_size"], o["grid"], o["forget"])
    size = (maps.shape[-2], maps.shape[-1])
    shape = (o["kernel_size"], o["depth"], o["padding"], o["grid"], size, o["seed"])
    return OnlinePosENet(PosENet(in_channels, o["targets"], *shape).float(), o["lr"])


def saved_channels(state: Mapping[str, Any], kernel_size: int) -> int:
    """How many channels the readout reads whose state was saved."""
    return state["gram"].shape[-1] // kernel_size**2 if "gram" in state else state["readout"]["weight"].shape[1]


class OnlineScores(PositionScores):
    """Scores of a batch's predictions, as means over the views of each sample. It never waits for the device.

    Example:
        >>> target = torch.arange(16.0).view(1, 4, 4)
        >>> scores = OnlineScores(target)
        >>> scores.update(torch.stack([target, target, -target, target]), views=2)  # of two samples
        >>> scores.per_image()["spc"]
        tensor([[0.],
                [1.]])
    """

    def update(self, prediction: Tensor, views: int = 1) -> None:  # type: ignore[override]
        """Adds finite predictions (views * samples, T, H, W), view after view."""
        scores = {"spc": finite_spearman(prediction, self.target, self.target_ranks)}
        scores["mae"] = mean_absolute_error(prediction, self.target)
        scores["nmae"] = scores["mae"] / constant_error(self.target)
        for name, values in scores.items():
            getattr(self, name).append(values.float().unflatten(0, (views, len(values) // views)).mean(0))
        constant = is_constant(prediction, self.target)
        states: list[Tensor] = self.constant  # type: ignore[assignment]
        states.append(constant.unflatten(0, (views, len(constant) // views)).all(0))


def by_view(features: Tensor, samples: int, batch: Any) -> Tensor:
    """Features (views * samples, ...) as (views, samples, ...).

    They come view after view, except where ``batch`` has a tensor (samples, views, ...), such as the frames of videos.

    Example:
        >>> by_view(torch.arange(6), 2, batch=torch.zeros(2, 3, 8, 8)).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    views = len(features) // samples
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if views > 1 and any(leaf.shape[:2] == (samples, views) for leaf in leaves):
        return features.unflatten(0, (samples, views)).transpose(0, 1)
    return features.unflatten(0, (views, samples))


def finite_spearman(prediction: Tensor, maps: Tensor, ranks: Tensor) -> Tensor:
    """SPC of finite predictions (B, T, H, W) with maps (T, H, W) of known ranks: (B, T); 0 for a constant one."""
    parts = prediction.split(1) if prediction.device.type == "cpu" and len(prediction) else [prediction]
    spc = torch.cat([(standard_ranks(part) * ranks).sum(-1) for part in parts])
    return torch.where(is_constant(prediction, maps), 0.0, spc)
