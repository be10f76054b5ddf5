"""The controls of position embeddings: with them a ViT holds position at every block, without them it holds none."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from padprobe.maps import position_maps
from padprobe.network.embedding import set_position_embedding
from padprobe.probe.encoder import probe_encoder
from padprobe.readout.ridge import RidgeStatistics, solve
from padprobe.readout.spec import Readout
from padprobe.scores import spearman
from padprobe.stimuli import load_images
from tasks.data.scenes import Scenes

SIZE, PATCH = 32, 4  # 8 x 8 patches


def make_vit(width, scale=1.0):
    """A ViT as timm initializes it: its embedding has a standard deviation of 0.02, times ``scale``."""
    torch.manual_seed(0)
    vit = VisionTransformer(SIZE, PATCH, embed_dim=width, depth=2, num_heads=2, num_classes=0)
    vit.pos_embed.data *= scale
    return vit.eval()


@torch.no_grad()
def read(vit, images, n_train):
    """SPC of H and V by block, read by ridge from the tokens of the other images."""
    caught = []
    handles = [block.register_forward_hook(lambda module, args, output: caught.append(output)) for block in vit.blocks]
    vit(images)
    for handle in handles:
        handle.remove()
    maps, scores = position_maps(SIZE, ["H", "V"]), []
    for tokens in caught:
        cells = tokens[:, vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, (SIZE // PATCH,) * 2)
        statistics = RidgeStatistics(cells.shape[1], grid=SIZE // PATCH)
        statistics.update(cells[:n_train], torch.arange(n_train) % 5 == 4)
        scores.append(spearman(solve(statistics, ["H", "V"], maps)(cells[n_train:]), maps).mean(0))
    return torch.stack(scores)  # (blocks, targets)


@pytest.fixture(scope="module")
def leaves():
    images = load_images("dead_leaves", SIZE, 100)
    return torch.stack([images[i] for i in range(100)])


@pytest.mark.parametrize(("width", "scale", "least"), [(64, 1, 0.6), (96, 1, 0.85), (32, 10, 0.6)])
def test_an_untrained_vit_reads_position_at_every_block_and_its_twin_without_embedding_none(
    leaves, width, scale, least
):
    """An embedding of 0.02 in 32 channels is less than what the patches' content spreads over all of them: there it
    takes a larger one (H 0.21, V -0.01 at its own scale)."""
    vit = make_vit(width, scale)
    learned, none = (read(set_position_embedding(vit, mode), leaves, 70) for mode in ("learned", "none"))
    assert learned.min() > least
    assert none.abs().max() < 0.15


def test_a_shuffled_embedding_still_tells_the_patches_apart(leaves):
    assert read(set_position_embedding(make_vit(96), "shuffled"), leaves, 70).min() > 0.8


@pytest.fixture(scope="module")
def trained():
    """Two ViTs trained for 30 steps to tell what is in each patch of a scene, of which sky and water differ only in
    where they are: with and without position embedding; and the scenes' images."""
    scenes = [Scenes(160, SIZE)[i] for i in range(160)]
    images, labels = (torch.stack([scene[key] for scene in scenes]) for key in ("image", "labels"))
    shares = F.avg_pool2d(F.one_hot(labels, 5).permute(0, 3, 1, 2).float(), PATCH).flatten(2).transpose(1, 2)
    vits = {}
    for mode in ("learned", "none"):
        vit, head = set_position_embedding(make_vit(64), mode).train(), nn.Linear(64, 5)
        optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], 3e-3)
        for _ in range(30):
            batch = torch.randint(100, (32,))
            predicted = head(vit.forward_features(images[batch])[:, 1:])
            loss = F.cross_entropy(predicted.flatten(0, 1), shares[batch].flatten(0, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        vits[mode] = vit.eval()
    return vits, images


@pytest.mark.slow
def test_a_vit_trained_with_embedding_holds_position_and_one_trained_without_holds_none(trained):
    vits, images = trained
    scores = {mode: read(vit, images, 100) for mode, vit in vits.items()}
    assert scores["learned"][:, 0].min() > 0.5  # H, which the labels need less
    assert scores["learned"][:, 1].min() > 0.85  # V
    assert scores["none"].abs().max() < 0.15


@pytest.mark.slow
def test_a_trained_vit_loses_its_position_with_its_embedding(trained):
    vits, images = trained
    removed = read(set_position_embedding(vits["learned"], "none"), images, 100)
    set_position_embedding(vits["learned"], "learned")
    assert removed.abs().max() < 0.15


def test_the_probe_states_the_position_embedding_of_each_run():
    size = {"image_size": SIZE, "grid": SIZE // PATCH, "limit_train": 20, "limit_test": 8, "untrained": 0}
    options = {
        **size,
        "targets": ["V"],
        "stages": ["blocks.0", "blocks.1"],
        "readouts": [Readout("ridge", kernel_size=1)],
    }
    vit, scores = make_vit(96), {}
    for mode in ("learned", "none"):
        vit = set_position_embedding(vit, mode)
        results = probe_encoder(vit, test={"dead_leaves": "dead_leaves"}, labels={"run": mode}, **options)
        assert results.runs["position_embedding"].tolist() == [mode]
        rows = results.rows[(results.rows["metric"] == "spc") & (results.rows["stages"] == "all")]
        scores[mode] = rows["value"].item()
    assert scores["learned"] > 0.5
    assert abs(scores["none"]) < 0.2
