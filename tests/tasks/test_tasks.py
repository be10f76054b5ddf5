import pytest
import torch
from lightning.pytorch import Trainer

from padprobe import PositionProbeCallback, load_encoder
from padprobe.padding import list_padding
from tasks.classification import ClassificationTask
from tasks.data.scenes import ScenesDataModule
from tasks.networks import DenseNetwork
from tasks.saliency import SaliencyTask
from tasks.segmentation import SegmentationTask

TASKS = {
    SaliencyTask: ({}, {"test/max_fmeasure", "test/adaptive_fmeasure", "test/mae"}),
    SegmentationTask: ({"classes": 5}, {"test/miou"}),
    ClassificationTask: ({"classes": 3}, {"test/top1"}),
}


@pytest.mark.parametrize("padding", ["zeros", "valid"])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_with_the_probe_attached_and_scores(tmp_path, vgg_options, task, padding):
    options, metrics = TASKS[task]
    module = task(**options, encoder="smp:vgg11", encoder_options=vgg_options, padding=padding, image_size=32, lr=0.01)
    before = {k: v.clone() for k, v in module.net.state_dict().items()}
    data = ScenesDataModule(train=16, val=8, test=8, image_size=32, batch_size=8)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PositionProbeCallback(image_size=32, grid=8)],
    )
    trainer.fit(module, datamodule=data)
    scores = trainer.test(module, datamodule=data, verbose=False)[0]
    assert metrics <= scores.keys()
    assert all(0 <= scores[name] <= 1 for name in metrics)
    assert {"position/H/spc", "val/loss"} <= trainer.callback_metrics.keys() | {"val/loss"}
    changed = [k for k, v in module.net.state_dict().items() if not torch.equal(v, before[k])]
    assert any("encoder" in k for k in changed)


@pytest.mark.parametrize("task", TASKS)
def test_only_the_encoder_pads_and_only_if_asked(vgg_options, task):
    options = TASKS[task][0] | {"encoder": "smp:vgg11", "encoder_options": vgg_options, "image_size": 32}
    assert list_padding(task(**options, padding="valid")) == []
    padded = list_padding(task(**options, padding="zeros"))
    assert padded
    assert all("encoder" in row.layer for row in padded)


@pytest.mark.parametrize("padding", ["zeros", "valid"])
def test_a_dense_network_gives_every_pixel_a_score(vgg_options, padding):
    encoder = load_encoder("smp:vgg11", padding=padding, options=vgg_options)
    assert DenseNetwork(encoder, 7, 40)(torch.rand(2, 3, 40, 40)).shape == (2, 7, 40, 40)
    with pytest.raises(ValueError, match="30 x 30 px"):
        DenseNetwork(encoder, 7, 40)(torch.rand(2, 3, 30, 30))


def test_with_context_an_unpadded_network_sees_the_padded_ones_maps_wherever_no_padding_reaches(vgg_options):
    image = torch.rand(1, 3, 160, 160)
    maps = {}
    for padding in ("zeros", "valid"):
        network = DenseNetwork(load_encoder("smp:vgg11", padding=padding, options=vgg_options), 2, 96, "context").eval()
        seen = []
        for lateral in network.laterals:
            lateral.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        network(image)
        maps[padding] = seen
    for stage, (padded, unpadded) in enumerate(zip(maps["zeros"], maps["valid"], strict=True)):
        assert padded.shape == unpadded.shape
        reach = {0: 2, 1: 6, 2: 8}[stage]  # cells that padding can reach, generously
        inner = (..., slice(reach, -reach), slice(reach, -reach))
        assert padded[inner].numel() > 0
        assert torch.allclose(padded[inner], unpadded[inner], atol=1e-4)
        assert not torch.allclose(padded, unpadded, atol=1e-4)
    unpadded = DenseNetwork(load_encoder("smp:vgg11", padding="valid", options=vgg_options), 2, 96, "context")
    with pytest.raises(ValueError, match="give the data more context"):
        unpadded(image[..., :96, :96])


def test_an_unpadded_dense_network_is_blind_on_a_constant_image(vgg_options):
    for padding, blind in (("valid", True), ("zeros", False)):
        network = DenseNetwork(load_encoder("smp:vgg11", padding=padding, options=vgg_options), 2, 48).eval()
        logits = network(torch.full((1, 3, 48, 48), 0.7))
        assert bool((logits.amax((2, 3)) - logits.amin((2, 3))).max() < 1e-5) == blind


def test_bad_networks_are_refused_before_training(vgg_options):
    with pytest.raises(ValueError, match=r"20 x 20 image is too small .*: the smallest that works is"):
        SaliencyTask("smp:vgg11", vgg_options, padding="valid", image_size=20)
    with pytest.raises(ValueError, match="built on smp encoders"):
        SaliencyTask("torchvision:vgg11")
