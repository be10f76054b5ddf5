import dataclasses

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from padprobe.network.tap import align
from padprobe.probe.features import FeatureCache, FeatureReader
from padprobe.probe.options import ProbeOptions
from padprobe.probe.plan import make_plan
from padprobe.probe.train import make_readouts
from padprobe.readout.ridge import RidgeStatistics
from padprobe.readout.spec import Readout

CPU = torch.device("cpu")


def read(encoder, images, size=16, unpadded=False):
    """Reads the centre of the images, or, unpadded, all of them; in that case the stages are cropped."""
    options = ProbeOptions(grid=6, image_size=size, batch_size=4, stages=["0", "1"])
    plan, source_px = make_plan(encoder, options), tuple(images.shape[-2:])
    sides = plan.size, tuple(side // 2 for side in plan.size)
    plan = dataclasses.replace(plan, source_px=source_px, unpadded=unpadded, sides=sides)
    with FeatureReader(encoder, plan, Fabric(accelerator="cpu", devices=1)) as reader:
        batches = list(reader.batches(images, ""))
    return plan, torch.cat([index for index, _ in batches]), torch.cat([features for _, features in batches])


def small_encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5))


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (21, 9)])
def test_features_are_the_aligned_stages_and_the_image_in_their_channels(size):
    encoder = small_encoder()
    images = torch.rand(6, 3, *size)
    plan, index, features = read(encoder, images, size)
    assert index.tolist() == list(range(6))
    assert plan.channels == {"f1": slice(0, 4), "f2": slice(4, 9), "rgb": slice(9, 12)}
    assert plan.width == 12
    with torch.no_grad():
        first = encoder[0](images)
        assert torch.allclose(features[:, :4], align(first, 6), atol=1e-6)
        assert torch.allclose(features[:, 4:9], align(encoder[1](first), 6), atol=1e-6)
    assert torch.equal(features[:, 9:], align(images, 6))


def test_the_encoder_is_left_as_it_was_even_where_only_a_part_of_it_was_training():
    encoder = small_encoder().train()
    encoder[2].eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    read(encoder, torch.rand(4, 3, 16, 16))
    assert [module.training for module in encoder] == [True, True, False]
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert not any(module._forward_hooks for module in encoder.modules())


def test_with_context_a_padded_encoder_sees_the_centre_and_an_unpadded_one_all():
    seen = []
    encoder = small_encoder()
    encoder[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]) if not args[0].is_meta else None)
    images = torch.rand(2, 3, 24, 30)
    _, _, padded = read(encoder, images, (16, 20))
    _, _, unpadded = read(encoder, images, (16, 20), unpadded=True)
    assert torch.equal(seen[0], images[..., 4:20, 5:25])
    assert torch.equal(seen[1], images)
    assert torch.equal(padded[:, 9:], unpadded[:, 9:])  # the control sees the centre either way
    inner = slice(1, -1)  # cells that no padding reaches are the same
    assert torch.allclose(padded[:, :4, inner, inner], unpadded[:, :4, inner, inner], atol=1e-5)
    assert not torch.allclose(padded[:, :4, 0], unpadded[:, :4, 0], atol=1e-2)


def test_a_cache_on_disk_is_the_cache_in_memory_and_leaves_no_file(tmp_path):
    features = torch.randn(9, 3, 5, 5)
    out = torch.empty(4, 3, 5, 5)
    read = []
    for budget in (1.0, 0.0):
        cache = FeatureCache(9, 3, 5, budget, tmp_path, CPU)
        for index in torch.randperm(9).split(2):
            cache.write(index, features[index])
        cache.check(Fabric(accelerator="cpu", devices=1))
        assert cache.where.endswith("in memory" if budget else "on disk")
        assert list(tmp_path.iterdir()) == []  # the file has no name even while it is in use
        read.append([cache.read(torch.tensor(index), out).clone() for index in ([8, 0, 3], [1, 7, 2, 4])])
    for memory, disk in zip(*read, strict=True):
        assert torch.equal(memory, disk)
    assert torch.equal(read[0][0], features[[8, 0, 3]].half().float())


def test_ridge_chooses_its_penalty_on_the_last_fifth_of_the_images_in_any_batching(monkeypatch):
    """So copies of an image, one after the other, are not in both parts."""
    images, update = torch.rand(12, 3, 16, 16), RidgeStatistics.update
    for batch_size in (5, 12):
        flags = []

        def record(self, features, held_out, flags=flags):
            flags += held_out.tolist()
            update(self, features, held_out)

        monkeypatch.setattr(RidgeStatistics, "update", record)
        readouts = [Readout("ridge", kernel_size=1, stages="f1")]
        facts = {"grid": 6, "image_size": 16, "stages": ["0", "1"], "selectivity": False}
        plan = make_plan(small_encoder(), ProbeOptions(batch_size=batch_size, readouts=readouts, **facts))
        with FeatureReader(small_encoder(), plan, Fabric(accelerator="cpu", devices=1)) as reader:
            make_readouts(reader, images)
        count = len(flags) // 12  # ridge readouts, the control on the image alone included
        held_out = torch.tensor(flags).view(-1)
        assert held_out.sum() == 2 * count
        if batch_size == 12:
            assert held_out.view(count, 12).nonzero()[:, 1].unique().tolist() == [10, 11]
