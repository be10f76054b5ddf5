import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image

from padprobe.cli import main
from tasks.data.files import check_samples, pair, read_image, read_labels, read_saliency


def gray(*values: int, shape=(8, 10)) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), shape)


def photo(shape=(8, 10)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


@pytest.fixture
def bad(pictures):
    """A data set with everything wrong with it, and what a listing must say of each file."""
    for split in ("train", "test"):
        pictures(f"images/{split}/good.jpg", photo((80, 100)))
        pictures(f"masks/{split}/good.png", gray(0, 10, 11, shape=(80, 100)))
    for name in ("truncated", "empty", "sixteen", "label", "size", "turned"):
        pictures(f"images/train/{name}.jpg", photo((80, 100)))
        pictures(f"masks/train/{name}.png", gray(0, 10, 11, shape=(80, 100)))
    cut = pictures.folder / "images/train/truncated.jpg"
    cut.write_bytes(cut.read_bytes()[:-2000])
    (pictures.folder / "images/train/empty.jpg").write_bytes(b"")
    pictures("images/train/lonely.png", photo())
    pictures("masks/train/orphan.png", gray(0))
    pictures("masks/train/sixteen.png", gray(0, shape=(80, 100)).astype(np.uint16))
    pictures("masks/train/label.png", gray(0, 37, shape=(80, 100)))
    pictures("masks/train/size.png", gray(0, shape=(40, 100)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo((80, 100))).save(pictures.folder / "images/train/turned.jpg", exif=exif)
    pictures("images/train/more/a.png", photo())
    (pictures.folder / "masks/train/notes.npy").write_bytes(b"1")
    (pictures.folder / "masks/train/.hidden").write_bytes(b"1")
    return {
        "images/train/turned.jpg": "save it upright",
        "images/train/more": "is no image",
        "masks/train/notes.npy": "is no image",
        "images/train/truncated.jpg": "cannot be read",
        "images/train/empty.jpg": "is empty",
        "images/train/lonely.png": "an image without a mask",
        "masks/train/orphan.png": "a mask without an image",
        "masks/train/sixteen.png": "16 bits",
        "masks/train/label.png": "the label 37; expected 0 .. 10, or 11",
        "images/train/size.jpg": "is 100 x 80 px, its mask 100 x 40",
    }


def test_everything_that_is_wrong_is_named_once(pictures, bad):
    read = partial(read_labels, classes=11, ignore_index=11)
    samples, problems = pair(pictures.folder / "images/train", pictures.folder / "masks/train", read)
    problems += check_samples(samples)
    assert len(problems) == len(bad)
    for name, what in bad.items():
        (line,) = [problem for problem in problems if problem.startswith(f"{pictures.folder / name}: ")]
        assert what in line


CONFIG = """
model:
  class_path: tasks.segmentation.SegmentationTask
  init_args:
    classes: 11
    ignore_index: 11
    image_size: 32
    encoder: smp:vgg11
    encoder_options: {{config: [8, M, 8], out_channels: [8, 8], depth: 1}}
data:
  class_path: tasks.data.labels.LabelFolders
  init_args:
    root: {root}
    classes: [a, b, c, d, e, f, g, h, i, j, k]
    ignore_index: 11
    has_val: false
    image_size: 32
    batch_size: 1
trainer: {{accelerator: cpu, logger: false, max_steps: 1}}
"""


def test_the_command_lists_it_and_training_refuses_to_start(pictures, bad, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "fit.yaml"
    config.write_text(CONFIG.format(root=pictures.folder))
    assert main(["data", "check", str(config)]) == 1
    listing = capsys.readouterr().out
    assert all(str(pictures.folder / name) in listing for name in bad)
    assert f"{len(bad)} problems" in listing
    with pytest.raises(ValueError, match=rf"{len(bad)} problems with the data"):
        main(["fit", "--config", str(config)])
    shutil.rmtree(pictures.folder / "images/train")
    shutil.rmtree(pictures.folder / "masks/train")
    for name in ("one", "two"):
        pictures(f"images/train/{name}.jpg", photo((80, 100)))
        pictures(f"masks/train/{name}.png", gray(0, 10, 11, shape=(80, 100)))
    assert main(["data", "check", str(config)]) == 0
    assert "no problems" in capsys.readouterr().out
    assert main(["fit", "--config", str(config)]) == 0
    with pytest.raises(ValueError, match=r"the data have 11 classes and ignore the label 11, the task 11 and 255"):
        main(["fit", "--config", str(config), "--model.init_args.ignore_index=255"])
    config.write_text(
        config.read_text().replace("has_val: false", "has_val: false\n    images: images/train\n    masks: masks/train")
    )
    assert main(["data", "check", str(config)]) == 1
    assert "one.jpg: is in train and in test (2 such images)" in capsys.readouterr().out


def test_a_config_without_data_is_named(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("model: {}")
    assert main(["data", "check", str(tmp_path / "x.yaml")]) == 2
    assert "has no `data`" in capsys.readouterr().err
    assert main(["data", "check", "nowhere.yaml"]) == 2
    (tmp_path / "x.yaml").write_text("data: {class_path: tasks.data.scenes.ScenesDataModule}")
    assert main(["data", "check", str(tmp_path / "x.yaml")]) == 2
    assert "ScenesDataModule has no check()" in capsys.readouterr().err


def test_a_saliency_mask_is_read_as_it_is_told(pictures):
    graded = pictures("graded.png", gray(0, 51, 127, 128, 255))
    with pytest.raises(ValueError, match=r"graded.png: is not binary \(5 values"):
        read_saliency(graded)
    assert set(np.unique(read_saliency(graded, "threshold"))) == {0, 1}
    assert read_saliency(graded, "threshold").mean() == pytest.approx(2 / 5)
    assert np.allclose(read_saliency(graded, "graded"), gray(0, 51, 127, 128, 255) / np.float32(255))
    for name, pixels in {"ones": gray(0, 1), "usual": gray(0, 255)}.items():
        assert np.array_equal(read_saliency(pictures(f"{name}.png", pixels)), gray(0, 1))
    dim = pictures("dim.png", gray(0, 100))
    with pytest.raises(ValueError, match=r"dim.png: its two values are 0 and 100"):
        read_saliency(dim, "threshold")
    colors = pictures("rgb.png", np.repeat(gray(0, 255)[..., None], 3, 2))  # as some sets have them
    assert np.array_equal(read_saliency(colors), gray(0, 1))


def test_pairs_that_could_be_either_are_named(pictures):
    pictures("images/a.jpg", photo())
    pictures("images/a.png", photo())
    pictures("masks/a.png", gray(0))
    problems = pair(pictures.folder / "images", pictures.folder / "masks", read_saliency)[1]
    assert problems == [f"{pictures.folder}/images/a.png: has the same stem as a.jpg"]
    with pytest.raises(ValueError, match=r"no data folder .*nowhere"):
        pair(pictures.folder / "images", pictures.folder / "nowhere", read_saliency)
    (pictures.folder / "none").mkdir()
    assert "no image has a mask" in pair(pictures.folder / "none", pictures.folder / "none", read_saliency)[1][0]


def test_a_gray_photo_has_three_channels(pictures):
    assert read_image(pictures("gray.png", gray(7))).shape == (8, 10, 3)
