import numpy as np
import pytest
import torch

from tasks.metrics import SaliencyScores


def direct(prediction: np.ndarray, mask: np.ndarray):
    """F-measure at every threshold, the adaptive one and MAE of one image, in a loop."""
    p = prediction.astype(np.float64)
    if p.max() > p.min():
        p = (p - p.min()) / (p.max() - p.min())

    def f(chosen):
        hits = (chosen & mask).sum()
        if hits == 0:
            return 0.0
        precision, recall = hits / chosen.sum(), hits / mask.sum()
        return 1.3 * precision * recall / (0.3 * precision + recall)

    levels = (p * 255).astype(np.uint8)
    curve = [f(levels >= threshold) for threshold in range(255, -1, -1)]
    return curve, f(p >= min(2 * p.mean(), 1)), np.abs(p - mask).mean()


@pytest.mark.parametrize("kind", ["random", "ties", "good", "constant", "empty mask", "full mask"])
def test_scores_are_those_of_a_direct_loop(kind):
    rng = np.random.default_rng(0)
    mask = rng.random((6, 12, 9)) < 0.3
    prediction = rng.random((6, 12, 9)).astype(np.float32)
    if kind == "ties":
        prediction = np.round(prediction * 3) / 3
    elif kind == "good":
        prediction = (0.7 * mask + 0.3 * prediction).astype(np.float32)
    elif kind == "constant":
        prediction[:] = 0.4
    elif kind == "empty mask":
        mask[::2] = False
    elif kind == "full mask":
        mask[1] = True
    scores = SaliencyScores()
    for part in (slice(0, 2), slice(2, 6)):
        scores.update(torch.from_numpy(prediction[part]), torch.from_numpy(mask[part]).float())
    result = scores.compute()
    images = [direct(p, m) for p, m in zip(prediction, mask, strict=True)]
    assert result["max_fmeasure"].item() == pytest.approx(np.mean([c for c, _, _ in images], 0).max(), abs=1e-6)
    assert result["adaptive_fmeasure"].item() == pytest.approx(np.mean([a for _, a, _ in images]), abs=1e-6)
    assert result["mae"].item() == pytest.approx(np.mean([e for _, _, e in images]), abs=1e-6)


def test_a_perfect_map_scores_one_and_shapes_must_agree():
    mask = torch.zeros(1, 8, 8)
    mask[0, 2:5, 2:5] = 1
    scores = SaliencyScores()
    scores.update(mask, mask)
    assert {k: round(v.item(), 6) for k, v in scores.compute().items()} == {
        "max_fmeasure": 1,
        "adaptive_fmeasure": 1,
        "mae": 0,
    }
    with pytest.raises(ValueError, match="expected"):
        scores.update(mask[None], mask[None])
