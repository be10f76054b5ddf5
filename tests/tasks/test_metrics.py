import numpy as np
import py_sod_metrics as sod
import pytest
import torch

from tasks.metrics import SaliencyScores, StructureScores
from tasks.segmentation import SegmentationTask


def direct(prediction: np.ndarray, mask: np.ndarray):
    """F-measure at every threshold and MAE of one image, in a loop."""
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
    return curve, np.abs(p - mask).mean()


KINDS = ["random", "ties", "good", "constant", "empty mask", "full mask"]


def examples(kind: str):
    """Predictions (6, 12, 9) float32 and masks, bool."""
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
    return prediction, mask


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_direct_loop(kind):
    prediction, mask = examples(kind)
    scores = SaliencyScores()
    for part in (slice(0, 2), slice(2, 6)):
        scores.update(torch.from_numpy(prediction[part]), torch.from_numpy(mask[part]).float())
    result = scores.compute()
    images = [direct(p, m) for p, m in zip(prediction, mask, strict=True)]
    assert result["max_fmeasure"].item() == pytest.approx(np.mean([c for c, _ in images], 0).max(), abs=1e-6)
    assert result["mae"].item() == pytest.approx(np.mean([e for _, e in images]), abs=1e-6)


def test_a_perfect_map_scores_one_and_shapes_must_agree():
    mask = torch.zeros(1, 8, 8)
    mask[0, 2:5, 2:5] = 1
    scores = SaliencyScores()
    scores.update(mask, mask)
    assert {k: round(v.item(), 6) for k, v in scores.compute().items()} == {"max_fmeasure": 1, "mae": 0}
    with pytest.raises(ValueError, match="expected"):
        scores.update(mask[None], mask[None])


@pytest.mark.filterwarnings("ignore:This class will be removed")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_pysodmetrics(kind):
    prediction, mask = examples(kind)
    scores, structure = SaliencyScores(), StructureScores()
    for part in (slice(0, 2), slice(2, 6)):
        maps = torch.from_numpy(prediction[part]), torch.from_numpy(mask[part]).float()
        scores.update(*maps)
        structure.update(*maps)
    f, error, s, e = sod.Fmeasure(), sod.MAE(), sod.Smeasure(), sod.Emeasure()
    for p, m in zip(prediction, mask, strict=True):
        p = p.astype(np.float64)
        if p.max() > p.min():
            p = (p - p.min()) / (p.max() - p.min())
        for metric in (f, error, s, e):
            metric.step(p, m, normalize=False)
    expected = {
        "max_fmeasure": f.get_results()["fm"]["curve"].max(),
        "mae": error.get_results()["mae"],
        "smeasure": s.get_results()["sm"],
        "max_emeasure": e.get_results()["em"]["curve"].max(),
    }
    computed = {k: v.item() for k, v in (scores.compute() | structure.compute()).items()}
    assert computed == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ignored", [255, 4])
def test_miou_is_that_of_a_direct_confusion_matrix(vgg_options, ignored):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (4, 8, 8))  # class 3 is never there
    labels[rng.random(labels.shape) < 0.2] = ignored
    logits = rng.integers(0, 2, (4, 4, 8, 8)).astype(np.float32)  # ties: the first of the largest wins
    logits[:, 3] = -1
    logits[:2, 2] = -1
    task = SegmentationTask(4, ignored, encoder="smp:vgg11", encoder_options=vgg_options, image_size=32)
    for part in (slice(0, 1), slice(1, 4)):
        task.metrics["test"].update(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))
    computed = {k: v.item() for k, v in task.metrics["test"].compute().items()}

    chosen, kept = logits.argmax(1), labels != ignored
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (labels[kept], chosen[kept]), 1)
    hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    assert computed["test/miou"] == pytest.approx((hits[:3] / union[:3]).mean(), abs=1e-4)
    assert [computed[f"test/iou_{k}"] for k in range(3)] == pytest.approx(hits[:3] / union[:3], abs=1e-4)
