"""How well a predicted map agrees with its target: SPC, MAE and nMAE (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

CONSTANT_RANGE = 1e-5
"""A prediction whose range is under this fraction of its target's range counts as constant."""


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 0..n-1 along the last dimension, ties sharing their average rank.

    Shape (..., n) -> (..., n), float64. NaN has no rank: give finite values.
    """
    ordered, order = values.sort(dim=-1)
    n = values.shape[-1]
    index = torch.arange(n, device=values.device).expand(values.shape)
    edge = ordered[..., 1:] != ordered[..., :-1]
    true = torch.ones_like(edge[..., :1])
    first = torch.where(torch.cat([true, edge], -1), index, 0).cummax(-1).values
    last = torch.where(torch.cat([edge, true], -1), index, n - 1).flip(-1).cummin(-1).values.flip(-1)
    shared = (first + last).double() / 2
    return torch.empty_like(shared).scatter_(-1, order, shared)


def standard_ranks(maps: Tensor) -> Tensor:
    """Ranks of each map's pixels with mean 0 and norm 1, so that a dot product is the correlation.

    Shape (..., H, W) -> (..., H*W), float64; a constant map gives zeros.
    """
    flat = maps.flatten(-2)
    ranks = average_ranks(flat) - (flat.shape[-1] - 1) / 2
    return ranks / ranks.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def spearman(prediction: Tensor, target: Tensor) -> Tensor:
    """Spearman's rank correlation (SPC) of each predicted map with its target.

    Shapes (..., H, W), broadcast against each other -> (...,), float64 in [-1, 1]; ties get average ranks, as in
    ``scipy.stats.spearmanr``. Where either map is constant, scipy gives NaN and this gives 0, as the paper's tables do.
    Float noise on a constant has ranks too: see :func:`is_constant`.

    Raises:
        ValueError: where the maps' sizes differ or a value is not finite.

    Source: paper, section 3.2.
    """
    if prediction.shape[-2:] != target.shape[-2:]:
        raise ValueError(
            f"prediction is {tuple(prediction.shape[-2:])} px and target {tuple(target.shape[-2:])} px: "
            "resize one of them to the other's size"
        )
    if not (prediction.isfinite().all() and target.isfinite().all()):
        raise ValueError("a map has NaN or infinite values, which have no rank: mask or replace them first")
    return (standard_ranks(prediction) * standard_ranks(target)).sum(-1).clamp(-1, 1)


def is_constant(prediction: Tensor, target: Tensor) -> Tensor:
    """Whether a prediction says nothing: its range is under 1e-5 of the target's (``CONSTANT_RANGE``).

    Shapes (..., H, W), broadcast -> (...,), bool. The ranks of such a map are float noise that correlates by chance.
    """
    return _range(prediction) < CONSTANT_RANGE * _range(target)


def _range(maps: Tensor) -> Tensor:
    return maps.amax((-2, -1)) - maps.amin((-2, -1))


def mean_absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """MAE of each predicted map: shapes (..., H, W), broadcast -> (...,), in the target's units."""
    return (prediction - target).abs().mean((-2, -1))


def constant_error(target: Tensor) -> Tensor:
    """MAE of the best constant prediction (the median), the unit of nMAE: (..., H, W) -> (...,).

    .251 for H and V, .197 for G and .317 for the stripes on [0, 1] at 224 x 224.
    """
    flat = target.flatten(-2)
    middle = (flat.shape[-1] - 1) // 2
    median = flat.sort(-1).values[..., middle, None]  # torch's median is not deterministic on a GPU
    return (flat - median).abs().mean(-1)


def score_maps(prediction: Tensor, target: Tensor, target_ranks: Tensor | None = None) -> dict[str, Tensor]:
    """SPC, MAE and nMAE of predicted position maps, image by image.

    Args:
        prediction: shape (B, T, H, W).
        target: the position maps, shape (T, H, W).
        target_ranks: ``standard_ranks(target)``, where the caller has it.

    Returns:
        ``spc``, ``mae`` and ``nmae``, float32, and ``constant``, bool, each of shape (B, T). nMAE = MAE / (MAE of the
        best constant). SPC is 0 where ``constant``, see :func:`is_constant`.

    Raises:
        ValueError: where the shapes do not fit or a prediction is not finite.

    Source: paper, section 3.2.
    """
    if prediction.shape[1:] != target.shape:
        raise ValueError(
            f"predictions are {tuple(prediction.shape)}; expected (images, *{tuple(target.shape)}), "
            "one channel a target at the target's size"
        )
    prediction = prediction.float()
    if not prediction.isfinite().all():
        raise ValueError("a prediction has NaN or infinite values, which have no rank: check the features it is of")
    ranks = standard_ranks(target) if target_ranks is None else target_ranks
    constant = is_constant(prediction, target)
    # image by image on a CPU: ranking all at once is twice as slow, for the pages of its large temporaries
    parts = prediction.split(1 if prediction.device.type == "cpu" else len(prediction))
    spc = torch.cat([(standard_ranks(part) * ranks).sum(-1) for part in parts])
    mae = mean_absolute_error(prediction, target)
    return {
        "spc": torch.where(constant, 0.0, spc).float(),
        "mae": mae,
        "nmae": mae / constant_error(target),
        "constant": constant,
    }


class BorderProfile:
    """SPC and MAE of predicted maps by the distance to the nearest border, ring by ring.

    Args:
        target: the position maps, shape (T, H, W).
        width: of a ring in pixels.
    """

    def __init__(self, target: Tensor, width: float) -> None:
        height, breadth = target.shape[-2:]
        self.target = target.flatten(1)
        self.rings = rings(height, breadth, width)
        self.distances = [(i + 0.5) * width for i in range(len(self.rings))]
        self.ranks = [standard_ranks(self.target[:, ring, None]) for ring in self.rings]

    def score(self, prediction: Tensor) -> dict[str, Tensor]:
        """``spc`` and ``mae`` of predictions (B, T, H, W), each (B, T, rings); SPC is 0 where the prediction is
        constant on the ring, measured by the range of the whole target as :func:`is_constant` does."""
        flat = prediction.float().flatten(2)
        spc, mae = [], []
        for ring, ranks in zip(self.rings, self.ranks, strict=True):
            part = flat[..., ring]
            constant = is_constant(part[..., None], self.target[..., None])
            spc.append(torch.where(constant, 0.0, (standard_ranks(part[..., None]) * ranks).sum(-1)).float())
            mae.append((part - self.target[:, ring]).abs().mean(-1))
        return {"spc": torch.stack(spc, -1), "mae": torch.stack(mae, -1)}


def rings(height: int, breadth: int, width: float) -> list[Tensor]:
    """The flat indices of each ring's pixels: those at distances [i width, (i + 1) width) from the nearest border."""
    y, x = torch.arange(height)[:, None], torch.arange(breadth)[None, :]
    distance = torch.minimum(torch.minimum(y, height - 1 - y), torch.minimum(x, breadth - 1 - x)) + 0.5
    ring = (distance / width).int().flatten()
    return [torch.nonzero(ring == i)[:, 0] for i in range(int(ring.max()) + 1)]


class PositionScores(Metric):
    """SPC, MAE and nMAE of predicted position maps, image by image, over any number of batches and processes.

    ``update`` takes predictions of shape (B, T, H, W); ``compute`` gives what :func:`score_maps` gives, for n images in
    all: each of shape (n, T).

    Args:
        target: the position maps, shape (T, H, W).

    Source: paper, section 3.2: SPC per image, then the mean over images.
    """

    full_state_update = False
    target: Tensor
    target_ranks: Tensor

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("target_ranks", standard_ranks(target), persistent=False)
        for name in ("spc", "mae", "nmae", "constant"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, prediction: Tensor) -> None:
        for name, values in score_maps(prediction, self.target, self.target_ranks).items():
            getattr(self, name).append(values)

    def compute(self) -> dict[str, Tensor]:
        def joined(state: list[Tensor] | Tensor) -> Tensor:  # torchmetrics hands over a tensor after a sync
            return torch.cat(state) if isinstance(state, list) else state

        return {name: joined(getattr(self, name)) for name in ("spc", "mae", "nmae", "constant")}

    def per_image(self) -> dict[str, Tensor]:
        """:meth:`compute` with every value of shape (n, T): torchmetrics squeezes that of one image and target."""
        return {name: values.reshape(-1, len(self.target)) for name, values in self.compute().items()}
