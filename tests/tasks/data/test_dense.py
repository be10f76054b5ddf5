import albumentations as A
import numpy as np
import pytest
import torch

from tasks.data.labels import LabelFolders
from tasks.data.saliency import LAYOUTS, SaliencyData, SaliencyFolder


@pytest.fixture
def folders(pictures):
    """Images whose red channel is 20 times their label."""
    rng = np.random.default_rng(0)
    for split, n in {"train": 20, "val": 3, "test": 4}.items():
        for i in range(n):
            labels = np.kron(rng.integers(0, 11, (4, 6)), np.ones((8, 8))).astype(np.uint8)
            pictures(f"images/{split}/{i:02d}.png", np.stack([20 * labels, labels, labels], 2))
            pictures(f"masks/{split}/{i:02d}.png", labels)
    return str(pictures.folder)


NAMES = [chr(97 + i) for i in range(11)]


def agree(batch, context: int) -> float:
    """Share of pixels whose image says the same label as the label map."""
    red = batch["image"][:, 0]
    red = red[:, context : red.shape[1] - context, context : red.shape[2] - context]
    return ((red * 255 / 20).round() == batch["labels"]).float().mean().item()


@pytest.mark.parametrize("context", [0, 8])
def test_image_and_labels_go_through_the_same_geometry(folders, context):
    flips = [A.HorizontalFlip(p=0.5), A.Rotate(limit=(90, 90), p=0.5)]
    data = LabelFolders(folders, NAMES, image_size=32, context=context, batch_size=20, augment=flips)
    data.prepare_data()
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (20, 3, 32 + 2 * context, 32 + 2 * context)
    assert batch["labels"].shape == (20, 32, 32)
    assert batch["labels"].dtype == torch.int64
    assert agree(batch, context) > 0.75  # the rest are the blocks' edges, where the image is interpolated
    assert agree({"image": batch["image"].flip(-1), "labels": batch["labels"]}, context) < 0.5


def test_augmentation_is_drawn_from_seed_epoch_and_image_alone(folders):
    """Whatever torch drew before, however many workers there are, and whether or not the training was resumed."""

    def images(seed: int, workers: int, first: int = 0) -> list[torch.Tensor]:
        flips = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]
        data = LabelFolders(folders, NAMES, image_size=8, batch_size=5, num_workers=workers, augment=flips, seed=seed)
        loader = data.train_dataloader()
        epochs = []
        for epoch in range(first, 3):
            loader.sampler.set_epoch(epoch)
            epochs.append(torch.cat([batch["image"] for batch in loader]))
        return epochs

    def by_image(epoch: torch.Tensor) -> torch.Tensor:
        return epoch[epoch.flatten(1).sum(1).argsort()]  # a flip does not change the sum

    whole = images(0, 0)
    for workers in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(images(0, workers, 1), whole[1:], strict=True))
    assert not torch.equal(by_image(whole[0]), by_image(whole[1]))
    assert not torch.equal(by_image(whole[0]), by_image(images(1, 0)[0]))


def test_augmentation_without_our_sampler_is_drawn_from_torchs_seed(folders):
    """As with several processes, where Lightning uses another sampler."""

    def images(seed: int, workers: int) -> torch.Tensor:
        torch.manual_seed(seed)
        flips = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]
        dataset = LabelFolders(folders, NAMES, image_size=8, batch_size=5, augment=flips).train_dataloader().dataset
        loader = torch.utils.data.DataLoader(dataset, 5, num_workers=workers)
        return torch.stack([torch.cat([batch["image"] for batch in loader]) for _ in range(2)])

    for workers in (0, 2):
        first = images(0, workers)
        assert torch.equal(first, images(0, workers))
        assert not torch.equal(first, images(1, workers))
        assert not torch.equal(*first)  # each epoch draws anew


def test_every_epoch_has_an_order_of_its_own_that_the_seed_decides(folders):
    def orders(seed: int, first: int) -> list[list[int]]:
        sampler = LabelFolders(folders, NAMES, batch_size=5, seed=seed).train_dataloader().sampler
        epochs = []
        for epoch in range(first, 4):
            sampler.set_epoch(epoch)
            epochs.append(list(sampler))
        return epochs

    whole = orders(0, 0)
    assert all(sorted(order) == list(range(20)) for order in whole)
    assert len({tuple(order) for order in whole}) == 4
    assert orders(0, 2) == whole[2:]  # as a resumed training goes on
    assert orders(1, 0) != whole
    with pytest.raises(ValueError, match="batch_size is 50, but there are only 20 training images"):
        LabelFolders(folders, NAMES, batch_size=50).train_dataloader()


def test_splits_are_held_out_limited_and_the_same_every_time(folders):
    def names(split: str, **options) -> list[str]:
        return [sample.image.name for sample in LabelFolders(folders, NAMES, **options).split(split)]

    held = {split: names(split, has_val=False, holdout=0.25) for split in ("train", "val", "test")}
    assert [len(held[split]) for split in held] == [15, 5, 4]
    assert sorted(held["train"] + held["val"]) == names("train")
    assert len(names("val")) == 3
    assert names("train", limit=7) == names("train", limit=7) == sorted(names("train", limit=7))
    assert set(names("train", limit=7)) < set(names("train"))
    assert names("train", limit=7) != names("train", limit=7, seed=1)
    assert len(names("test", limit=100)) == 4
    assert all("image" not in batch for batch in LabelFolders(folders, NAMES).label_dataloader())


def test_normalized_images_have_imagenets_mean_taken_off(folders):
    plain, normalized = (LabelFolders(folders, NAMES, image_size=32, normalize=n).dataset("test")[0] for n in (0, 1))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    assert torch.allclose(normalized["image"], (plain["image"] - mean) / std, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_found(pictures, layout):
    images, masks = LAYOUTS[layout]
    for i in range(4):
        pictures(f"{images}/{i}.jpg", np.zeros((8, 8, 3), np.uint8))
        pictures(f"{masks}/{i}.png", np.full((8, 8), 255, np.uint8))
    folder = SaliencyFolder(str(pictures.folder), layout)
    data = SaliencyData(folder, folder, image_size=8, holdout=0.25)
    (problem,) = data.check()
    assert problem.endswith("0.jpg: is in train and in test (4 such images)")
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [3, 1, 4]
    item = data.dataset("test")[0]
    assert item["mask"].shape == (1, 8, 8)
    assert item["mask"].min() == 1


def test_bad_options_are_named(folders, monkeypatch):
    monkeypatch.delenv("PADPROBE_NOWHERE", raising=False)
    with pytest.raises(ValueError, match=r"PADPROBE_NOWHERE.*the environment variable is not set"):
        LabelFolders("$PADPROBE_NOWHERE/CamVid", NAMES).check()
    with pytest.raises(ValueError, match="image_size is 0; expected 1 or more"):
        LabelFolders(folders, NAMES, image_size=0)
    with pytest.raises(ValueError, match=r"holdout is 1.5"):
        LabelFolders(folders, NAMES, holdout=1.5)
    with pytest.raises(ValueError, match="unknown layout 'ECSD'; did you mean 'ECSSD'"):
        SaliencyFolder(folders, "ECSD").samples()
