import copy
import json
import shutil

import numpy as np
import pytest

from tasks.data.coco import CocoData


def square(x: int, y: int, side: int) -> list[list[float]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def run_lengths(pixels: np.ndarray) -> dict:
    """COCO's uncompressed run-length encoding, from its definition: column by column, zeros first."""
    flat = pixels.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"counts": np.diff(np.concatenate([[0], edges])).tolist(), "size": list(pixels.shape)}


@pytest.fixture
def coco(pictures):
    """Two images: a large cat (id 17) under a small dog (id 90) and over a crowd of dogs; and an image without any."""
    crowd = np.zeros((20, 24), np.uint8)
    crowd[0:6, 0:6] = 1
    cat = {"id": 2, "image_id": 7, "category_id": 17, "area": 100, "iscrowd": 0, "segmentation": square(4, 4, 10)}
    dog = {"id": 1, "image_id": 7, "category_id": 90, "area": 9, "iscrowd": 0, "segmentation": square(6, 6, 3)}
    dogs = {"id": 3, "image_id": 7, "category_id": 90, "area": 36, "iscrowd": 1, "segmentation": run_lengths(crowd)}
    content = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 24, "height": 20},
            {"id": 9, "file_name": "b.jpg", "width": 24, "height": 20},
        ],
        "annotations": [dog, cat, dogs],
        "categories": [{"id": 90, "name": "dog"}, {"id": 17, "name": "cat"}],
    }
    for name in ("a", "b"):
        pictures(f"pictures/{name}.jpg", np.zeros((20, 24, 3), np.uint8))
    expected = np.zeros((20, 24), np.uint8)
    expected[0:6, 0:6] = 255
    expected[4:14, 4:14] = 1  # categories in the order of their ids: cat, dog
    expected[6:9, 6:9] = 2
    return pictures.folder, content, expected


def data(folder, content, test=None, **options) -> CocoData:
    """Trains on ``content`` and tests on the same, or other, annotations of copies of its images."""
    (folder / "x.json").write_text(json.dumps(content))
    (folder / "y.json").write_text(json.dumps(test or content))
    shutil.copytree(folder / "pictures", folder / "others", dirs_exist_ok=True)
    return CocoData(str(folder), "x.json", "y.json", "pictures", "others", **options)


def test_instances_become_semantic_labels(coco, capsys):
    folder, content, expected = coco
    made = data(folder, content)
    assert made.check() == []
    assert capsys.readouterr().out == ""
    first, second = (sample.read() for sample in made.samples("test")[0])
    assert np.array_equal(first, expected)
    assert not second.any()
    assert [len(made.split(split)) for split in ("train", "val", "test")] == [1, 1, 2]
    square_ = data(folder, content, image_size=20).dataset("test")[0]
    assert set(square_["labels"].unique().tolist()) == {0, 1, 2, 255}


def test_categories_can_be_chosen_and_saliency_knows_none(coco):
    folder, content, expected = coco
    chosen = data(folder, content, categories=["dog"]).samples("test")[0][0].read()
    assert np.array_equal(chosen == 1, expected == 2)
    assert np.array_equal(chosen == 255, np.pad(np.ones((6, 6), bool), ((0, 14), (0, 18))))
    salient = data(folder, content, target="mask").samples("test")[0][0].read()
    assert np.array_equal(salient, (expected > 0).astype(np.float32))
    with pytest.raises(ValueError, match=r"unknown category of .*x.json 'dgo'; did you mean 'dog'"):
        data(folder, content, categories=["dgo"]).check()


def test_train_and_test_share_the_training_categories(coco):
    folder, content, _ = coco
    other = copy.deepcopy(content)
    other["categories"] = [{"id": 3, "name": "bird"}, {"id": 90, "name": "dog"}, {"id": 95, "name": "cat"}]
    for annotation in other["annotations"]:
        annotation["category_id"] = {17: 95, 90: 90}[annotation["category_id"]]
    made = data(folder, content, other)
    train, test = (made.samples(split)[0][0].read() for split in ("train", "test"))
    assert np.array_equal(train, test)
    assert made.labels == (3, 255)
    (problem,) = made.check()
    assert problem.endswith("y.json: the training annotations have no category 'bird'")
    content["categories"][0]["name"] = "cat"
    with pytest.raises(ValueError, match=r"x.json: two categories are called 'cat'"):
        data(folder, content).check()


def test_everything_that_is_wrong_is_named(coco):
    folder, content, _ = coco
    test = copy.deepcopy(content)
    content["images"].append({"id": 11, "file_name": "gone.jpg", "width": 24, "height": 20})
    content["images"].append({"id": 12, "file_name": "c.jpg", "width": 30, "height": 20})
    content["images"].append({"id": 13, "file_name": "a.jpg", "width": 30})
    shutil.copy(folder / "pictures/a.jpg", folder / "pictures/c.jpg")
    base = {"area": 4, "iscrowd": 0}
    content["annotations"] += [
        base | {"id": 20, "image_id": 9, "category_id": 5, "segmentation": square(0, 0, 2)},
        base | {"id": 21, "image_id": 99, "category_id": 17, "segmentation": square(0, 0, 2)},
        base | {"id": 22, "image_id": 9, "category_id": 17, "segmentation": run_lengths(np.ones((5, 5), np.uint8))},
        base | {"id": 23, "image_id": 12, "category_id": 17},
    ]
    problems = "\n".join(data(folder, content, test).check())
    for what in (
        "gone.jpg: does not exist",
        "(image 12, c.jpg): annotation 23 cannot be read: KeyError 'segmentation'",
        "image 13 has no height",
        "(image 9, b.jpg): annotation 20 has the category 5, which the file does not list",
        "annotations of the image 99, which the file does not list",
        "(image 9, b.jpg): annotation 22 is 5 x 5 px, its image 24 x 20",
    ):
        assert what in problems
    assert len(problems.splitlines()) == 6
    content["annotations"].pop()
    assert "c.jpg: is 24 x 20 px, its mask 30 x 20" in "\n".join(data(folder, content, test).check())
    (folder / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"x.json: is no COCO file"):
        CocoData(str(folder), "x.json", "x.json").check()
