"""Scores of saliency maps, as in the field's evaluation code."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

BETA2 = 0.3  # the field's weight of precision against recall


class SaliencyScores(Metric):
    """Max F-measure (beta^2 = 0.3) and MAE of saliency maps, over any number of batches and processes.

    ``update`` takes predictions (B, H, W) in any range and masks (B, H, W), in which a pixel over 0.5 is salient. Each
    prediction is first min-max scaled to [0, 1], as in the field's evaluation code. ``compute`` returns:

    - ``max_fmeasure``: the F-measure of each image at 256 thresholds, averaged over images; the maximum over
      thresholds;
    - ``mae``: mean absolute error.

    Source: Achanta et al., CVPR 2009 (F-measure), as the PySODMetrics package computes it.

    Example:
        >>> import torch
        >>> scores = SaliencyScores()
        >>> scores.update(torch.tensor([[[0.1, 0.2, 0.9]]]), torch.tensor([[[0.0, 0.0, 1.0]]]))
        >>> {name: round(float(value), 3) for name, value in scores.compute().items()}
        {'max_fmeasure': 1.0, 'mae': 0.042}
    """

    full_state_update = False
    curve: Tensor
    error: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("curve", torch.zeros(256, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        if prediction.shape != mask.shape or prediction.ndim != 3:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and mask {tuple(mask.shape)}: expected (B, H, W) for both"
            )
        p, salient = _scaled(prediction).flatten(1), mask.flatten(1) > 0.5
        level = (p * 255).long()  # the highest of the 256 thresholds that a pixel reaches
        bins = level + 256 * torch.arange(len(p), device=p.device)[:, None]

        def count_reaching(weight: Tensor) -> Tensor:
            """How many of an image's chosen pixels reach each threshold, from 255 down to 0: (B, 256)."""
            counts = torch.zeros(256 * len(p), dtype=p.dtype, device=p.device)
            counts.scatter_add_(0, bins.flatten(), weight.double().flatten())
            return counts.view(-1, 256).flip(1).cumsum(1)

        hits, predicted = count_reaching(salient), count_reaching(torch.ones_like(salient))
        precision = hits / predicted.clamp_min(1)
        recall = hits / salient.sum(1, keepdim=True).clamp_min(1)
        # 0 where no prediction is right
        fmeasure = (1 + BETA2) * precision * recall / (BETA2 * precision + recall).clamp_min(1e-12)
        self.curve += fmeasure.sum(0)
        self.error += (p - salient.double()).abs().mean(1).sum()
        self.count += len(p)

    def compute(self) -> dict[str, Tensor]:
        return {
            "max_fmeasure": (self.curve.max() / self.count).float(),
            "mae": (self.error / self.count).float(),
        }


class StructureScores(Metric):
    """S-measure and E-measure of saliency maps, over any number of batches and processes.

    ``update`` takes the same input as :class:`SaliencyScores` and scales predictions in the same way. ``compute``
    returns:

    - ``smeasure``: the mean over images;
    - ``max_emeasure``: the mean over images at each of 256 thresholds; the maximum over thresholds.

    The PySODMetrics package computes them image by image on the CPU. This is slow: meant for the test set, not for
    validation.

    Source: Fan et al., ICCV 2017 (S-measure) and IJCAI 2018 (E-measure).

    Example:
        >>> import torch
        >>> scores = StructureScores()
        >>> mask = (torch.arange(16) > 7).float().expand(1, 16, 16)
        >>> scores.update(mask, mask)
        >>> {name: round(float(value), 2) for name, value in scores.compute().items()}
        {'smeasure': 1.0, 'max_emeasure': 1.0}
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
    """Maps (B, H, W), each min-max scaled to [0, 1] in float64; NaN counts as 0, a constant map is clamped."""
    p = prediction.double().nan_to_num(0.0)
    low, high = p.amin((1, 2), keepdim=True), p.amax((1, 2), keepdim=True)
    return torch.where(high > low, (p - low) / (high - low).clamp_min(torch.finfo(p.dtype).tiny), p.clamp(0, 1))
