"""How well a predicted map agrees with its target: SPC, MAE and nMAE (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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
    return (flat - flat.median(-1, keepdim=True).values).abs().mean(-1)


class PositionScores(Metric):
    """SPC, MAE and nMAE of predicted position maps, image by image, over any number of batches and processes.

    ``update`` takes predictions of shape (B, T, H, W); ``compute`` gives, for n images in all, a dictionary of ``spc``,
    ``mae`` and ``nmae``, each of shape (n, T), and ``constant``, bool (n, T): where the prediction was constant and SPC
    is 0 by definition (see :func:`is_constant`). nMAE = MAE / (MAE of the best constant).

    Args:
        target: the position maps, shape (T, H, W).

    Source: paper, section 3.2: SPC per image, then the mean over images.
    """

    full_state_update = False
    target: Tensor
    target_ranks: Tensor
    spc: list[Tensor]
    mae: list[Tensor]
    constant: list[Tensor]

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("target_ranks", standard_ranks(target), persistent=False)
        for name in ("spc", "mae", "constant"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, prediction: Tensor) -> None:
        if prediction.shape[1:] != self.target.shape:
            raise ValueError(
                f"predictions are {tuple(prediction.shape)}; expected (images, *{tuple(self.target.shape)}), "
                "one channel a target at the target's size"
            )
        prediction = prediction.float()
        if not prediction.isfinite().all():
            raise ValueError("a prediction has NaN or infinite values, which have no rank: check the features it is of")
        constant = is_constant(prediction, self.target)
        spc = (standard_ranks(prediction) * self.target_ranks).sum(-1)
        self.spc.append(torch.where(constant, 0.0, spc).float())
        self.mae.append(mean_absolute_error(prediction, self.target))
        self.constant.append(constant)

    def compute(self) -> dict[str, Tensor]:
        def joined(state: list[Tensor] | Tensor) -> Tensor:  # torchmetrics hands over a tensor after a sync
            return torch.cat(state) if isinstance(state, list) else state

        mae = joined(self.mae)
        return {
            "spc": joined(self.spc),
            "mae": mae,
            "nmae": mae / constant_error(self.target),
            "constant": joined(self.constant),
        }

    def per_image(self) -> dict[str, Tensor]:
        """:meth:`compute` with every value of shape (n, T): torchmetrics squeezes that of one image and target."""
        return {name: values.reshape(-1, len(self.target)) for name, values in self.compute().items()}


def summarize(scores: dict[str, Tensor], targets: Sequence[str]) -> list[dict[str, Any]]:
    """Per-image scores, as :class:`PositionScores` gives them, as one row a target and metric.

    Rows have ``target``, ``metric`` (spc, mae, nmae: the mean over images; constant: the number of images), ``value``,
    ``ci_low``, ``ci_high`` (95% percentile bootstrap over images, NaN for a single image or a count) and ``n``.
    """
    from scipy.stats import bootstrap

    rows = []
    for metric, values in scores.items():
        per_image = values.double().cpu().numpy()  # (n, T)
        n = len(per_image)
        mean = per_image.sum(0) if metric == "constant" else per_image.mean(0)
        low = high = np.full_like(mean, np.nan)
        if n > 1 and metric != "constant":
            interval = bootstrap(
                (per_image,), np.mean, axis=0, n_resamples=1000, method="percentile", rng=0, batch=100
            ).confidence_interval
            low, high = interval.low, interval.high
        for i, target in enumerate(targets):
            row = {"target": target, "metric": metric, "value": mean[i], "ci_low": low[i], "ci_high": high[i], "n": n}
            rows.append(row)
    return rows
