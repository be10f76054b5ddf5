"""Scores of a predicted map against its target: SPC, MAE and nMAE (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

CONSTANT_RANGE = 1e-5
"""A prediction counts as constant if its range is below this fraction of its target's range."""
CHUNK = 2**18
"""Maps are ranked in parts of about this many values (five maps of 224 x 224 px): ranking takes 57 bytes per value."""


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 0..n-1 along the last dimension; equal values share their average rank.

    Shape (..., n) -> (..., n), float64. NaN has no rank: pass finite values.

    Example:
        >>> average_ranks(torch.tensor([3.0, 1.0, 3.0, 9.0]))
        tensor([1.5000, 0.0000, 1.5000, 3.0000], dtype=torch.float64)
    """
    n = values.shape[-1]
    ranks = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    rows, places = values.reshape(-1, n), ranks.view(-1, n)
    for part, place in zip(*(maps.split(max(CHUNK // n, 1)) for maps in (rows, places)), strict=True):
        place.copy_(_rank_rows(part))
    return ranks


def _rank_rows(values: Tensor) -> Tensor:
    """:func:`average_ranks` of rows (m, n), all at once."""
    ordered, order = values.sort(dim=-1)
    n = values.shape[-1]
    index = torch.arange(n, device=values.device).expand(values.shape)
    edge = ordered[..., 1:] != ordered[..., :-1]
    true = torch.ones_like(values[..., :1], dtype=torch.bool)  # also where there is one value
    first = torch.where(torch.cat([true, edge], -1), index, 0).cummax(-1).values
    last = torch.where(torch.cat([edge, true], -1), index, n - 1).flip(-1).cummin(-1).values.flip(-1)
    shared = (first + last).double() / 2
    return torch.empty_like(shared).scatter_(-1, order, shared)


def standard_ranks(maps: Tensor) -> Tensor:
    """Ranks of each map's pixels, scaled to mean 0 and norm 1: the dot product of two maps' ranks is their SPC.

    Shape (..., H, W) -> (..., H*W), float64. A constant map gives zeros.

    Example:
        >>> standard_ranks(torch.tensor([[5.0, 7.0], [5.0, 7.0]]))
        tensor([-0.5000,  0.5000, -0.5000,  0.5000], dtype=torch.float64)
    """
    flat = maps.flatten(-2)
    ranks = average_ranks(flat) - (flat.shape[-1] - 1) / 2
    return ranks / ranks.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def spearman(prediction: Tensor, target: Tensor) -> Tensor:
    """Spearman's rank correlation (SPC) of each predicted map with its target.

    Shapes (..., H, W), broadcast against each other -> (...,), float64 in [-1, 1]. Ties get average ranks, as in
    ``scipy.stats.spearmanr``. Where a map is constant, scipy gives NaN; this gives 0, as in the paper's tables. A map
    that is constant up to rounding still has ranks: test it with :func:`is_constant`.

    Raises:
        ValueError: if the maps differ in size or a value is not finite.

    Source: paper, section 3.2.

    Example:
        >>> ramp = torch.arange(16.0).view(4, 4)
        >>> spearman(torch.stack([ramp**2, -ramp, ramp * 0]), ramp)
        tensor([ 1., -1.,  0.], dtype=torch.float64)
    """
    if prediction.shape[-2:] != target.shape[-2:]:
        raise ValueError(
            f"prediction is {tuple(prediction.shape[-2:])} px and target {tuple(target.shape[-2:])} px: "
            "resize one to the size of the other"
        )
    if not (prediction.isfinite().all() and target.isfinite().all()):
        raise ValueError("a map has NaN or infinite values, which have no rank: mask or replace them first")
    return (standard_ranks(prediction) * standard_ranks(target)).sum(-1).clamp(-1, 1)


def is_constant(prediction: Tensor, target: Tensor) -> Tensor:
    """Whether a prediction is constant up to rounding: its range is below 1e-5 of its target's (``CONSTANT_RANGE``).

    Shapes (..., H, W), broadcast -> (...,), bool. The ranks of such a map are rounding noise, which correlates with the
    target by chance.

    Example:
        >>> ramp = torch.arange(16.0).view(4, 4)
        >>> is_constant(torch.stack([ramp, 5 + 1e-7 * ramp]), ramp)
        tensor([False,  True])
    """
    return _range(prediction) < CONSTANT_RANGE * _range(target)


def _range(maps: Tensor) -> Tensor:
    return maps.amax((-2, -1)) - maps.amin((-2, -1))


def mean_absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """MAE of each predicted map, in the target's units: shapes (..., H, W), broadcast -> (...,).

    Example:
        >>> mean_absolute_error(torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        tensor(0.5000)
    """
    return (prediction - target).abs().mean((-2, -1))


def constant_error(target: Tensor) -> Tensor:
    """MAE of the best constant prediction (the median): (..., H, W) -> (...,). It is the unit of nMAE.

    At 224 x 224 on [0, 1]: 0.251 for H and V, 0.197 for G, 0.317 for the stripes.

    Example:
        >>> constant_error(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor(0.5000)
    """
    flat = target.flatten(-2)
    middle = (flat.shape[-1] - 1) // 2
    median = flat.sort(-1).values[..., middle, None]  # torch's median is not deterministic on a GPU
    return (flat - median).abs().mean(-1)


def score_maps(prediction: Tensor, target: Tensor, target_ranks: Tensor | None = None) -> dict[str, Tensor]:
    """SPC, MAE and nMAE of predicted position maps, for each image.

    Args:
        prediction: shape (B, T, H, W).
        target: the position maps, shape (T, H, W).
        target_ranks: ``standard_ranks(target)``, if the caller has computed it already.

    Returns:
        ``spc``, ``mae`` and ``nmae``, float32, and ``constant``, bool, each of shape (B, T). nMAE is MAE divided by the
        MAE of the best constant. SPC is 0 where ``constant`` is true, see :func:`is_constant`.

    Raises:
        ValueError: if the shapes do not fit or a prediction is not finite.

    Source: paper, section 3.2.

    Example:
        >>> target = torch.arange(16.0).view(1, 4, 4) / 15
        >>> {name: scores.tolist() for name, scores in score_maps(target[None], target).items()}
        {'spc': [[1.0]], 'mae': [[0.0]], 'nmae': [[0.0]], 'constant': [[False]]}
    """
    if prediction.shape[1:] != target.shape:
        raise ValueError(
            f"predictions have shape {tuple(prediction.shape)}; expected (images, *{tuple(target.shape)}), "
            "one channel per target at the target's size"
        )
    prediction = prediction.float()
    if not prediction.isfinite().all():
        raise ValueError("a prediction has NaN or infinite values, which have no rank: check the features behind it")
    ranks = standard_ranks(target) if target_ranks is None else target_ranks
    constant = is_constant(prediction, target)
    parts = prediction.split(max(CHUNK // ranks.numel(), 1))
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
        width: width of a ring in pixels.

    Attributes:
        rings: the pixels of each ring, see :func:`rings`.
        distances: the distance of each ring's middle from the border, in pixels.

    Example:
        >>> target = torch.arange(64.0).view(1, 8, 8) / 63
        >>> profile = BorderProfile(target, width=2)
        >>> profile.distances, profile.score(target[None])["mae"].tolist()
        ([1.0, 3.0], [[[0.0, 0.0]]])
    """

    def __init__(self, target: Tensor, width: float) -> None:
        self.target = target.flatten(1)
        self.rings = rings(border_distance(target.shape[-2], target.shape[-1]), width)
        self.distances = [(i + 0.5) * width for i in range(len(self.rings))]
        self._ranks = [standard_ranks(self.target[:, ring, None]) for ring in self.rings]

    def score(self, prediction: Tensor) -> dict[str, Tensor]:
        """``spc`` and ``mae`` of predictions (B, T, H, W), each of shape (B, T, rings).

        SPC is 0 where the prediction is constant on the ring: its range there is below 1e-5 of the whole target's.
        """
        flat = prediction.float().flatten(2)
        spc, mae = [], []
        for ring, ranks in zip(self.rings, self._ranks, strict=True):
            part = flat[..., ring]
            constant = is_constant(part[..., None], self.target[..., None])
            spc.append(torch.where(constant, 0.0, (standard_ranks(part[..., None]) * ranks).sum(-1)).float())
            mae.append((part - self.target[:, ring]).abs().mean(-1))
        return {"spc": torch.stack(spc, -1), "mae": torch.stack(mae, -1)}


def border_distance(height: int, width: int, cell: tuple[float, float] = (1.0, 1.0), first: float = 0.5) -> Tensor:
    """The distance of each cell of a map to the nearest of its four borders: (height, width), float32.

    Args:
        height, width: of the map in cells.
        cell: height and width of a cell, in the unit of the distances.
        first: distance of the outermost cells' centres from the border, in cells; 0 where they lie on it.

    Example:
        >>> border_distance(3, 5, cell=(2, 1))
        tensor([[0.5000, 1.0000, 1.0000, 1.0000, 0.5000],
                [0.5000, 1.5000, 2.5000, 1.5000, 0.5000],
                [0.5000, 1.0000, 1.0000, 1.0000, 0.5000]])
    """
    y, x = torch.arange(height), torch.arange(width)
    rows = (torch.minimum(y, height - 1 - y) + first) * cell[0]
    columns = (torch.minimum(x, width - 1 - x) + first) * cell[1]
    return torch.minimum(rows[:, None], columns[None, :])


def rings(distance: Tensor, width: float) -> list[Tensor]:
    """The pixels or cells of a map by their distance to the border, as flat indices, one tensor per ring.

    Ring i holds those at distances from i to i + 1 ring widths (exclusive).

    Example:
        >>> [ring.tolist() for ring in rings(border_distance(3, 4), 1)]
        [[0, 1, 2, 3, 4, 7, 8, 9, 10, 11], [5, 6]]
    """
    ring = (distance / width).int().flatten()
    return [torch.nonzero(ring == i)[:, 0] for i in range(int(ring.max()) + 1)]


class PositionScores(Metric):
    """SPC, MAE and nMAE of predicted position maps, for each image, over any number of batches and processes.

    ``update`` takes predictions of shape (B, T, H, W). ``compute`` returns the dictionary of :func:`score_maps` for
    all n images so far, with values of shape (n, T).

    Args:
        target: the position maps, shape (T, H, W).

    Source: paper, section 3.2: one SPC per image, then the mean over images.

    Example:
        >>> target = torch.arange(32.0).view(2, 4, 4)
        >>> scores = PositionScores(target)
        >>> for batch in (target[None], -target.expand(3, 2, 4, 4)):
        ...     scores.update(batch)
        >>> scores.per_image()["spc"].mean(0)
        tensor([-0.5000, -0.5000])
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
        def joined(state: list[Tensor] | Tensor) -> Tensor:  # after a sync, torchmetrics gives a tensor
            return torch.cat(state) if isinstance(state, list) else state

        return {name: joined(getattr(self, name)) for name in ("spc", "mae", "nmae", "constant")}

    def per_image(self) -> dict[str, Tensor]:
        """:meth:`compute` with all values of shape (n, T), which torchmetrics squeezes for one image and one target."""
        return {name: values.reshape(-1, len(self.target)) for name, values in self.compute().items()}
