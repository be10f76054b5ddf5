import dataclasses

import torch
from lightning.fabric import Fabric
from torch import nn

from padprobe.network.tap import align
from padprobe.probe.features import FeatureCache, FeatureReader
from padprobe.probe.options import ProbeOptions
from padprobe.probe.plan import make_plan

CPU = torch.device("cpu")


def read(encoder, images, source_px=16, unpadded=False, sides=(16, 8)):
    options = ProbeOptions(grid=6, image_size=16, batch_size=4, stages=["0", "1"])
    plan = dataclasses.replace(make_plan(encoder, options), source_px=source_px, unpadded=unpadded, sides=sides)
    with FeatureReader(encoder, plan, Fabric(accelerator="cpu", devices=1)) as reader:
        batches = list(reader.batches(images, ""))
    return plan, torch.cat([index for index, _ in batches]), torch.cat([features for _, features in batches])


def small_encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5))


def test_features_are_the_aligned_stages_and_the_image_in_their_channels():
    encoder = small_encoder()
    images = torch.rand(6, 3, 16, 16)
    plan, index, features = read(encoder, images)
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
    images = torch.rand(2, 3, 24, 24)
    _, _, padded = read(encoder, images, source_px=24)
    _, _, unpadded = read(encoder, images, source_px=24, unpadded=True)
    assert torch.equal(seen[0], images[..., 4:20, 4:20])
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
