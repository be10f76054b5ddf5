"""Scores of saliency maps, as in the field's evaluation code."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from py_sod_metrics import Emeasure, Smeasure
from torch import Tensor
from torchmetrics import Metric

BETA2 = 0.3  # the field's weight of precision against recall


class SaliencyMetric(Metric, ABC):
    """Two scores of saliency maps, over any number of batches and processes.

    ``update`` takes predictions (B, H, W) in any range and masks (B, H, W), in which a pixel over 0.5 is salient. Each
    prediction is first min-max scaled to [0, 1], as in the field's evaluation code. ``compute`` returns, by the names
    in the class attribute ``names``, the score at 256 thresholds, averaged over images, at its maximum over thresholds;
    and the other score, averaged over images.
    """

    names: tuple[str, str]
    full_state_update = False
    curve: Tensor
    single: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("curve", 256), ("single", ()), ("count", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, prediction: Tensor, salient: Tensor) -> tuple[Tensor, Tensor]:
        """The score at each threshold (256,) and the other score, summed over the images.

        Args:
            prediction: (B, H, W) in [0, 1], float64.
            salient: (B, H, W), bool.
        """

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        if prediction.shape != mask.shape or prediction.ndim != 3:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and mask {tuple(mask.shape)}: expected (B, H, W) for both"
            )
        p = prediction.double().nan_to_num(0.0)
        low, high = p.amin((1, 2), keepdim=True), p.amax((1, 2), keepdim=True)
        scaled = (p - low) / (high - low).clamp_min(torch.finfo(p.dtype).tiny)
        curve, single = self.score(torch.where(high > low, scaled, p.clamp(0, 1)), mask > 0.5)
        self.curve += curve
        self.single += single
        self.count += len(p)

    def compute(self) -> dict[str, Tensor]:
        means = self.curve.max() / self.count, self.single / self.count
        return {name: mean.float() for name, mean in zip(self.names, means, strict=True)}


class SaliencyScores(SaliencyMetric):
    """Max F-measure (beta^2 = 0.3) and mean absolute error (MAE), see :class:`SaliencyMetric`.

    Source: Achanta et al., CVPR 2009 (F-measure), as the PySODMetrics package computes it.

    Example:
        >>> import torch
        >>> scores = SaliencyScores()
        >>> scores.update(torch.tensor([[[0.1, 0.2, 0.9]]]), torch.tensor([[[0.0, 0.0, 1.0]]]))
        >>> {name: round(float(value), 3) for name, value in scores.compute().items()}
        {'max_fmeasure': 1.0, 'mae': 0.042}
    """

    names = "max_fmeasure", "mae"

    def score(self, prediction: Tensor, salient: Tensor) -> tuple[Tensor, Tensor]:
        p, salient = prediction.flatten(1), salient.flatten(1)
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
        return fmeasure.sum(0), (p - salient.double()).abs().mean(1).sum()


class StructureScores(SaliencyMetric):
    """Max E-measure and S-measure, see :class:`SaliencyMetric`.

    The PySODMetrics package computes them image by image on the CPU. This is slow: meant for the test set, not for
    validation.

    Source: Fan et al., ICCV 2017 (S-measure) and IJCAI 2018 (E-measure).

    Example:
        >>> import torch
        >>> scores = StructureScores()
        >>> mask = (torch.arange(16) > 7).float().expand(1, 16, 16)
        >>> scores.update(mask, mask)
        >>> {name: round(float(value), 2) for name, value in scores.compute().items()}
        {'max_emeasure': 1.0, 'smeasure': 1.0}
    """

    names = "max_emeasure", "smeasure"

    def score(self, prediction: Tensor, salient: Tensor) -> tuple[Tensor, Tensor]:
        curve, single = torch.zeros_like(self.curve), torch.zeros_like(self.single)
        for p, s in zip(prediction.cpu().numpy(), salient.cpu().numpy(), strict=True):
            enhanced, structure = Emeasure(), Smeasure()
            for metric in (enhanced, structure):
                metric.step(p, s, normalize=False)
            curve += torch.from_numpy(enhanced.get_results()["em"]["curve"]).to(curve)
            single += float(structure.get_results()["sm"])
        return curve, single
