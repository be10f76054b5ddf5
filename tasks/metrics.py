"""Scores of saliency maps as the field computes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

BETA2 = 0.3  # the field's weight of precision over recall


class SaliencyScores(Metric):
    """F-measure (beta^2 = .3) and MAE of saliency maps, over any number of batches and processes.

    ``update`` takes predictions (B, H, W) in any range and masks (B, H, W), salient where over one half. As in the
    field's evaluation code, each prediction is first min-max scaled to [0, 1]. ``compute`` gives

    - ``max_fmeasure``: per image the F-measure at each of 256 thresholds; the mean over images at each threshold; the
      maximum over thresholds;
    - ``mean_fmeasure``: the mean over thresholds instead;
    - ``adaptive_fmeasure``: at the image's own threshold, twice its mean (at most 1);
    - ``mae``: mean absolute error.

    Source: Achanta et al., CVPR 2009 (F-measure, adaptive threshold), in the form of the PySODMetrics package.
    """

    full_state_update = False
    curve: Tensor
    adaptive: Tensor
    error: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("curve", torch.zeros(256, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("adaptive", "error", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        if prediction.shape != mask.shape or prediction.ndim != 3:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and mask {tuple(mask.shape)}: expected (B, H, W) both"
            )
        b = len(prediction)
        p, salient = _scaled(prediction).flatten(1), mask.flatten(1) > 0.5

        level = (p * 255).long()  # the bin of each pixel, and from it how many pixels lie at or over each threshold
        bins = level + 256 * torch.arange(b, device=p.device)[:, None]

        def at_least(weight: Tensor) -> Tensor:
            counts = torch.zeros(256 * b, dtype=p.dtype, device=p.device)
            counts.scatter_add_(0, bins.flatten(), weight.double().flatten())
            return counts.view(b, 256).flip(1).cumsum(1)

        hits, found, there = at_least(salient), at_least(torch.ones_like(salient)), salient.sum(1, keepdim=True)
        self.curve += _fmeasure(hits, found, there).sum(0)

        chosen = p >= (2 * p.mean(1, keepdim=True)).clamp_max(1)
        hits = (chosen & salient).sum(1, keepdim=True)
        self.adaptive += _fmeasure(hits, chosen.sum(1, keepdim=True), there).sum()
        self.error += (p - salient.double()).abs().mean(1).sum()
        self.count += b

    def compute(self) -> dict[str, Tensor]:
        return {
            "max_fmeasure": (self.curve.max() / self.count).float(),
            "mean_fmeasure": (self.curve.mean() / self.count).float(),
            "adaptive_fmeasure": (self.adaptive / self.count).float(),
            "mae": (self.error / self.count).float(),
        }


class StructureScores(Metric):
    """S-measure and E-measure of saliency maps, over any number of batches and processes.

    ``update`` takes what :class:`SaliencyScores` takes, and scales predictions likewise. ``compute`` gives

    - ``smeasure``: the mean over images;
    - ``max_emeasure``: the mean over images at each of 256 thresholds, the maximum over thresholds.

    They are computed by the PySODMetrics package on the CPU, image by image: for tests, not for every validation.

    Source: Fan et al., ICCV 2017 (S-measure) and IJCAI 2018 (E-measure).
    """

    full_state_update = False
    structure: Tensor
    enhanced: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("structure", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("enhanced", torch.zeros(256, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        from py_sod_metrics import Emeasure, Smeasure

        scaled = _scaled(prediction).cpu().numpy()
        for p, salient in zip(scaled, (mask > 0.5).cpu().numpy(), strict=True):
            structure, enhanced = Smeasure(), Emeasure()
            structure.step(p, salient, normalize=False)
            enhanced.step(p, salient, normalize=False)
            self.structure += float(structure.get_results()["sm"])
            self.enhanced += torch.from_numpy(enhanced.get_results()["em"]["curve"]).to(self.enhanced)
            self.count += 1

    def compute(self) -> dict[str, Tensor]:
        return {
            "smeasure": (self.structure / self.count).float(),
            "max_emeasure": (self.enhanced.max() / self.count).float(),
        }


def _scaled(prediction: Tensor) -> Tensor:
    """Each map (B, H, W) min-max scaled to [0, 1] in float64; a constant one clamped to it, NaN as 0."""
    p = prediction.double().nan_to_num(0.0)
    low, high = p.amin((1, 2), keepdim=True), p.amax((1, 2), keepdim=True)
    return torch.where(high > low, (p - low) / (high - low).clamp_min(torch.finfo(p.dtype).tiny), p.clamp(0, 1))


def _fmeasure(hits: Tensor, found: Tensor, there: Tensor) -> Tensor:
    """F-measure from the numbers of correct, predicted and salient pixels; 0 where nothing is correct."""
    precision, recall = hits / found.clamp_min(1), hits / there.clamp_min(1)
    return (1 + BETA2) * precision * recall / (BETA2 * precision + recall).clamp_min(1e-12)
