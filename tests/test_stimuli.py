import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from padprobe.maps import size_pair
from padprobe.stimuli import ImageFolder, dark_noise, dead_leaves, disc, image_of, load_images


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        pixels = np.full((20, 30, 3), 50 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"image{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("size", [16, (10, 25), (20, 30)])
def test_a_folders_images_are_squashed_to_the_size_in_0_1(folder, size):
    images = load_images(folder, size)
    assert len(images) == 5
    assert images[4].shape == (3, *size_pair(size))
    assert images[4].unique().tolist() == pytest.approx([200 / 255])


def test_a_squashed_image_keeps_its_sides(tmp_path):
    """Left stays left and top stays top: the quarters of the image have their own colours."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, 20:, 0] = pixels[10:, :20, 1] = 255
    Image.fromarray(pixels).save(tmp_path / "quarters.png")
    squashed = ImageFolder(tmp_path, (30, 12))[0]
    assert squashed[:, 3, 10].tolist() == [1, 0, 0]
    assert squashed[:, 26, 2].tolist() == [0, 1, 0]
    assert squashed[:, 3, 2].tolist() == squashed[:, 26, 10].tolist() == [0, 0, 0]


def test_a_limit_takes_a_reproducible_sample(folder):
    chosen = {tuple(load_images(folder, 16, 3, seed).paths) for seed in range(8)}
    assert len(chosen) > 1
    assert load_images(folder, 16, 3, 1).paths == load_images(folder, 16, 3, 1).paths
    assert len(load_images(TensorDataset(torch.zeros(9, 3, 4, 4)), limit=4)) == 4


def test_bad_folders_and_images_are_named(folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"'blck' is neither a folder.*did you mean black"):
        load_images("blck")
    with pytest.raises(ValueError, match="no images in folder"):
        load_images(tmp_path_factory.mktemp("empty"))
    (folder / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot be read"):
        load_images(folder)


def test_a_truncated_image_is_named_before_any_is_used(folder):
    whole = folder / "image3.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"image3\.png: cannot be read"):
        ImageFolder(folder)


def test_constant_stimuli_and_the_authors_noise():
    assert load_images("black", (8, 5))[0].eq(torch.zeros(3, 8, 5)).all()
    assert load_images("white", (8, 5))[0].eq(torch.ones(3, 8, 5)).all()
    assert load_images("noise", (8, 5), 2)[1].shape == (3, 8, 5)
    noise = 255 * dark_noise(4)
    assert noise.mean() == pytest.approx(25, abs=0.2)
    assert noise.std() == pytest.approx(24, abs=1.5)
    assert noise.max() == pytest.approx(200)


def test_dead_leaves_are_stationary_and_depend_on_seed_and_index_alone():
    size = (32, 44)
    images = dead_leaves(120, size)
    assert torch.equal(dead_leaves(2, size), images[:2])
    assert not torch.equal(dead_leaves(1, size, seed=1), images[:1])
    mean = images.mean((0, 1))  # per pixel, over 360 values of sd about .29 that are 1/sqrt(12) for uniform colours
    error = 0.289 / (3 * len(images)) ** 0.5
    for border in (mean[0], mean[-1], mean[:, 0], mean[:, -1]):
        assert abs(border.mean() - 0.5) < 3 * error
    contrast = images.diff(dim=3).abs().mean((0, 1, 2))  # edges are as frequent at the border as in the middle
    assert contrast[:4].mean() == pytest.approx(contrast[12:20].mean(), rel=0.25)
    assert contrast[-4:].mean() == pytest.approx(contrast[12:20].mean(), rel=0.25)


@pytest.mark.parametrize("leaf", [(10.2, 7.9, 5.5), (-2.0, 3.0, 4.0), (18.0, 21.0, 6.3)])
def test_a_disc_is_what_a_direct_loop_finds(leaf):
    canvas = np.zeros((20, 25), bool)
    where, inside = disc(leaf, (20, 25))
    canvas[where] = inside
    x, y, r = leaf
    direct = [[(c + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 <= r * r for c in range(25)] for row in range(20)]
    assert np.array_equal(canvas, direct)


def test_images_are_found_in_any_kind_of_item():
    image = torch.zeros(3, 2, 2)
    for item in (image, (image, 1), [image, 1], {"image": image, "mask": 0}):
        assert image_of(item) is image
    with pytest.raises(ValueError, match="keys mask"):
        image_of({"mask": image})
    with pytest.raises(ValueError, match="expected an image tensor"):
        image_of((1, image))
