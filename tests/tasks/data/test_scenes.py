import numpy as np
import pytest
import torch

from padprobe import probe_encoder
from tasks.data.scenes import OBJECT, SKY, WATER, Scenes, ScenesDataModule


def test_scenes_depend_on_seed_and_index_alone():
    scenes = Scenes(5, 32, 0.5)
    again = Scenes(3, 32, 0.5)
    assert torch.equal(scenes[2]["image"], again[2]["image"])
    assert not torch.equal(scenes[2]["image"], scenes[1]["image"])
    assert not torch.equal(Scenes(3, 32, 0.5, seed=1)[2]["image"], scenes[2]["image"])
    with pytest.raises(IndexError):
        scenes[5]


def test_items_have_the_shapes_that_tasks_expect():
    item = Scenes(1, 40)[0]
    assert item["image"].shape == (3, 40, 40)
    assert item["image"].dtype == torch.float32
    assert 0 <= item["image"].min() <= item["image"].max() <= 1
    assert item["mask"].shape == (1, 40, 40)
    assert item["labels"].shape == (40, 40)
    assert item["labels"].dtype == torch.int64
    assert set(item["mask"].unique().tolist()) <= {0.0, 1.0}


def look(scenes: Scenes):
    """Of all scenes: mean colours of sky and water, their mean heights, and how salient and other objects differ."""
    sky, water, salient, other = [], [], [], []
    for item in (scenes[i] for i in range(len(scenes))):
        image, labels, mask = item["image"], item["labels"], item["mask"][0] > 0
        sky.append((image[:, labels == SKY].mean(1), torch.nonzero(labels == SKY)[:, 0].float().mean()))
        water.append((image[:, labels == WATER].mean(1), torch.nonzero(labels == WATER)[:, 0].float().mean()))
        for mean, chosen in ((salient, mask), (other, (labels == OBJECT) & ~mask)):
            if chosen.sum() > 30:
                mean.append(image[:, chosen].mean(1))

    def mean(values):
        return torch.stack(list(values)).nanmean(0)

    colors = (mean(c for c, _ in sky) - mean(c for c, _ in water)).abs().max()
    heights = mean(h for _, h in water) - mean(h for _, h in sky)
    return colors, heights, (mean(salient) - mean(other)).abs().max()


def test_labels_depend_on_appearance_at_0_and_on_position_at_1():
    colors, heights, objects = look(Scenes(80, 48, position_dependence=0.0))
    assert colors > 0.2
    assert abs(heights) < 4
    assert objects > 0.2
    colors, heights, objects = look(Scenes(80, 48, position_dependence=1.0))
    assert colors < 0.05
    assert heights > 15
    assert objects < 0.05


def test_at_1_the_salient_object_is_the_nearest_to_the_centre():
    scenes = Scenes(60, 48, position_dependence=1.0)
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(48) - 23.5, indexing="ij")
    distance = (x**2 + y**2).sqrt()
    salient, other = [], []
    for i in range(60):
        item = scenes[i]
        mask = item["mask"][0] > 0
        salient += distance[mask].tolist()
        other += distance[(item["labels"] == OBJECT) & ~mask].tolist()
    assert np.mean(salient) + 5 < np.mean(other)


@pytest.mark.parametrize("position_dependence", [0.0, 1.0])
def test_the_images_are_stationary_at_every_setting(position_dependence):
    """The RGB-only readout (PROTOCOL's control) finds no position in them, on any target."""
    blind = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1))
    results = probe_encoder(
        blind,
        Scenes(500, 48, position_dependence, seed=50),
        {"scenes": Scenes(400, 48, position_dependence, seed=51)},
        stages=["0"],
        image_size=48,
        grid=14,
        untrained=0,
    ).rows
    spc = results[(results.stages == "rgb") & (results.metric == "spc")]
    assert len(spc) == 5
    assert spc.value.abs().max() < 0.05, spc[["target", "value"]]


def test_the_data_module_keeps_its_sets_apart_and_its_order_reproducible():
    module = ScenesDataModule(train=8, val=4, test=4, image_size=32, batch_size=4)
    first = [batch["image"] for batch in module.train_dataloader()]
    again = [batch["image"] for batch in ScenesDataModule(8, 4, 4, 32, batch_size=4).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    images = [loader.dataset[0]["image"] for loader in (module.train_dataloader(), module.val_dataloader())]
    images.append(module.test_dataloader().dataset[0]["image"])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def test_a_dial_beyond_its_range_is_named():
    with pytest.raises(ValueError, match=r"position_dependence is 1\.5"):
        Scenes(position_dependence=1.5)
