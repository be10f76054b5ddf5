"""Images of any shape, and hosts whose encoder cannot be traced."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from padprobe import PositionProbeCallback
from padprobe.callbacks.attach import check_stages
from padprobe.network.tap import StageTap
from tests.conftest import Frozen, Host, trainer


def probe(**options):
    return PositionProbeCallback(**({"image_size": 32, "grid": 16} | options))


def batches_of(*sizes):
    """48 random images: eight batches, whose sizes take turns."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(6, 3, *sizes[i % len(sizes)], generator=generator) for i in range(8)]
    return DataLoader([(image, torch.zeros(6).long()) for image in images], batch_size=None)


def fit(tmp_path, host, data, *guests, **options):
    run = trainer(tmp_path, *guests, **{"max_epochs": 1, **options})
    run.fit(host, data, data)
    return {key: value.item() for key, value in run.callback_metrics.items()}


def test_the_shape_of_the_images_does_not_matter(tmp_path):
    """Nothing is cropped: the same host shows as much position in images that are wider or higher than square."""
    scores = {}
    for size in [(32, 32), (32, 34), (24, 32)]:
        torch.manual_seed(0)
        guest = probe(readout="ridge")
        scores[size] = fit(tmp_path, Frozen(), batches_of(size), guest)
        longer = max(size)
        assert guest._maps.shape[-2:] == (round(32 * size[0] / longer), round(32 * size[1] / longer))
    for target in ("H", "V"):
        square = scores[32, 32][f"position/{target}/spc"]
        assert square > 0.3
        for size, of_size in scores.items():
            assert of_size[f"position/{target}/spc"] == pytest.approx(square, abs=0.1), size


def test_images_whose_size_changes_from_batch_to_batch_are_scored(tmp_path):
    guest = probe(readout="ridge", image_size=(20, 30))
    torch.manual_seed(0)
    scores = fit(tmp_path, Frozen(), batches_of((24, 32), (32, 24), (40, 40)), guest)
    assert guest._maps.shape[-2:] == (20, 30)
    assert scores["position/V/spc"] > 0.3
    assert len(guest._scores[""].per_image()["spc"]) == 48
    assert "position/trouble" not in scores


def test_stages_that_have_one_pixel_in_the_first_batch_are_left_out(tmp_path):
    """As find_stages would at this size; the network is traced at 224."""
    host = Host()
    for _ in range(4):
        host.encoder += nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    guest = probe(image_size=224, each_stage=True)
    fit(tmp_path, host, batches_of((32, 32)), guest)
    assert sorted(guest._channels) == ["", "f1", "f2", "f3", "f4", "f5"]  # of 32, 16, 8, 4 and 2 pixels


class WithTime(Host):
    """The encoder takes more than images, and what it does depends on their values."""

    def __init__(self):
        super().__init__()
        layers = self.encoder

        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers, self.extra = layers, nn.LazyConv2d(16, 1)

            def forward(self, image, time):
                if image.mean() > time:
                    image = image * 0.5
                return self.extra(self.layers(image))

        self.encoder = Encoder()

    def forward(self, image):
        return self.head(self.encoder(image, 0.2).mean((2, 3)))


class Net(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, image):
        return self.encoder(image).mean((2, 3))


class CompiledParent(Host):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(Net(self.encoder), backend="eager")
        del self.encoder

    def forward(self, image):
        return self.head(self.net(image))


class Replaced(Host):
    """Its layers are replaced after `setup`, as those of synchronised BatchNorm and LoRA are."""

    def on_fit_start(self):
        self.encoder[1], self.encoder[2] = nn.BatchNorm2d(8), nn.ReLU()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (WithTime, {"stages": ["layers.2", "extra"]}),
        (CompiledParent, {"encoder": "net.encoder"}),
        (CompiledParent, {"encoder": "net._orig_mod.encoder", "stages": ["2"]}),
        (CompiledParent, {}),
        (Replaced, {}),
    ],
)
def test_hosts_that_cannot_be_traced_as_they_are_train_as_without_it(make, options, tmp_path):
    weights = []
    for guests in ([probe(**options)], []):
        torch.manual_seed(0)
        host = make()
        scores = fit(tmp_path, host, batches_of((32, 32)), *guests)
        weights.append(host.state_dict())
        assert ("position/V/spc" in scores, "position/trouble" in scores) == (bool(guests), False)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_without_names_such_a_host_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"found no stages.* name the layers to probe: stages="):
        fit(tmp_path, WithTime(), batches_of((32, 32)), probe())


def test_an_output_that_is_no_map_is_refused_before_the_first_step(tmp_path):
    host = Host()
    with pytest.raises(MisconfigurationException, match=r"'head' gives an output of shape \(6, 2\).*layout="):
        fit(tmp_path, host, batches_of((32, 32)), probe(encoder="", stages=["encoder.2", "head"]))
    assert host.trainer.global_step == 0


def test_a_fit_without_validation_is_refused_because_nothing_would_be_scored(tmp_path, host, batches):
    with pytest.raises(MisconfigurationException, match="this fit has none: pass a validation loader"):
        trainer(tmp_path, probe()).fit(host, batches)


def test_a_function_as_target_is_refused_at_once():
    with pytest.raises(ValueError, match="A function cannot be saved in a checkpoint"):
        probe(targets=["H", lambda y, x: x + y])


def test_ridge_has_kernel_1_and_two_gigabytes_unless_told_otherwise():
    assert probe(readout="ridge")._options["kernel_size"] == 1
    assert probe()._options["kernel_size"] == 3
    encoder = nn.Conv2d(3, 1472, 1)  # the channels of VGG16
    tap = StageTap(nn.Sequential(encoder), ["0"], 4)
    encoder(torch.rand(1, 3, 8, 8))
    check_stages(tap, True, None, probe(readout="ridge")._options)
    with pytest.raises(
        MisconfigurationException, match=r"1472 channels would take 2.8 GB, more than 2.0: use kernel_size=1"
    ):
        check_stages(tap, True, None, probe(readout="ridge", kernel_size=3)._options)


@pytest.mark.parametrize("options", [{}, {"readout": "ridge", "each_stage": True}], ids=["posenet", "ridge"])
def test_a_checkpoint_of_version_0_1_is_read(tmp_path, batches, options):
    """It knew square maps alone, called the start `before`, and had no layout."""
    torch.manual_seed(0)
    host, first = Host(), probe(**options)
    scores = fit(tmp_path, host, batches, first)
    state = first.state_dict()
    state["before"] = state.pop("start")[0].float()
    del state["size"], state["options"]["layout"]
    second = probe(**options)
    second.load_state_dict(state)
    run = trainer(tmp_path, second)
    run.validate(host, batches, verbose=False)
    for key in ("position/H/spc", "position/G/mae"):
        assert run.callback_metrics[key].item() == pytest.approx(scores[key], abs=1e-6)
