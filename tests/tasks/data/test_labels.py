import numpy as np
import pytest
from PIL import Image

from tasks.data.labels import VOCData


def test_voc_is_read_with_its_border_ignored(pictures):
    """A VOC devkit of our own; its label maps are palette images, as VOC's are."""
    base = pictures.folder / "VOCdevkit/VOC2012"
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    labels = np.zeros((12, 16), np.uint8)
    labels[2:6, 2:6], labels[6], labels[8:] = 20, 255, 1
    for split, names in {"train": ["a", "b", "c"], "val": ["d"]}.items():
        (base / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for name in names:
            pictures(f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg", np.zeros((12, 16, 3), np.uint8))
            image = Image.fromarray(labels, "P")
            image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
            (base / "SegmentationClass").mkdir(exist_ok=True)
            image.save(base / f"SegmentationClass/{name}.png")
    data = VOCData(str(pictures.folder), image_size=12, holdout=0.3)
    assert data.check() == []
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [2, 1, 1]
    assert set(data.dataset("test")[0]["labels"].unique().tolist()) == {0, 1, 20, 255}
    (base / "JPEGImages/d.jpg").unlink()
    assert [line for line in data.check() if "d.jpg: does not exist" in line]
    with pytest.raises(ValueError, match=r"no VOC 2007.*download: true"):
        VOCData(str(pictures.folder), "2007").check()
