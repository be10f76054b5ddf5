"""Hosts that call their encoder several times in a step."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from padprobe import PositionProbeCallback
from tests.conftest import Frozen, Host, trainer

MANY = "the encoder was called 6 times in one batch .4 at 16 x 16 px, 2 at 32 x 32 px.; the calls with the largest"


def probe(**options):
    return PositionProbeCallback(**({"image_size": 32, "grid": 8} | options))


def views_of(image):
    return image, image.flip(3)


class Views(Frozen):
    def forward(self, image):
        return sum(super(Views, self).forward(view) for view in views_of(image))


class MultiCrop(Frozen):
    """Local crops come between the global views, and in one batch each."""

    def forward(self, image):
        first, second = views_of(image)
        crops = [image[..., :16, :16], first, image[..., 16:, :16], second, *2 * [image[..., 8:24, 8:24]]]
        return sum(super(MultiCrop, self).forward(crop) for crop in crops)


class Together(Frozen):
    """The views of DINO: those of one size in one call, view after view."""

    def forward(self, image):
        return super().forward(torch.cat(views_of(image))).unflatten(0, (2, -1)).sum(0)


def fit(tmp_path, host, batches, guest, **options):
    run = trainer(tmp_path, guest, **{"max_epochs": 1, **options})
    run.fit(host, batches, batches)
    return {key: value.item() for key, value in run.callback_metrics.items() if key.startswith(guest._prefix)}


def test_all_calls_with_the_largest_input_are_read(tmp_path, batches):
    """Two calls, the same two among smaller crops, and both views in one call: the same readout and the same scores."""
    scores = {}
    for make in (Views, MultiCrop, Together):
        torch.manual_seed(0)
        host, guest = make(), probe(readout="ridge")
        host.eval()
        host.encoder[1] = nn.Identity()  # BatchNorm would see other batches
        if make is MultiCrop:
            with pytest.warns(UserWarning, match=MANY):
                scores[make] = fit(tmp_path, host, batches, guest)
        else:
            scores[make] = fit(tmp_path, host, batches, guest)
        assert len(guest._scores[""].per_image()["spc"]) == 48  # samples, not views
        assert guest._probes[""].statistics.images.sum() > 48
    for key, value in scores[Views].items():
        if "start" not in key and "change" not in key:
            assert scores[MultiCrop][key] == pytest.approx(value, abs=1e-5)
            assert scores[Together][key] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("make", [Views, Together])
def test_samples_that_a_sampler_repeats_are_left_out_with_all_their_views(make, rank, tmp_path, batches):
    """Of 51 images two processes see 26 each; the last of the second is the first again."""
    data = TensorDataset(torch.rand(51, 3, 32, 32), torch.zeros(51).long())
    sampler = DistributedSampler(data, 2, rank, shuffle=False)
    host, guest = make(), probe()
    fit(tmp_path, host, batches, guest)
    run = trainer(tmp_path, guest, use_distributed_sampler=False)
    run.validate(host, DataLoader(data, 8, sampler=sampler), verbose=False)
    assert len(guest._scores[""].per_image()["spc"]) == 26 - rank


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_gradient_checkpointing_computes_again_is_no_call(reentrant, tmp_path, batches, recwarn):
    class Checkpointed(Host):
        def forward(self, image):
            image = image.requires_grad_()
            return self.head(checkpoint(self.encoder, image, use_reentrant=reentrant).mean((2, 3)))

    class Plain(Host):
        def forward(self, image):
            return self.head(self.encoder(image).mean((2, 3)))

    states = []
    for make in (Checkpointed, Plain):
        torch.manual_seed(0)
        host, guest = make(), probe()
        host.encoder[1] = nn.Identity()  # BatchNorm would count twice
        fit(tmp_path, host, batches, guest)
        states.append(guest._probes[""].readout.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any("was called" in str(warning.message) for warning in recwarn)


class Pair(Host):
    """A student and its teacher."""

    def __init__(self):
        super().__init__()
        self.student = nn.ModuleDict({"backbone": self.encoder})
        self.teacher = nn.ModuleDict({"backbone": Host().encoder.requires_grad_(False)})
        del self.encoder

    def forward(self, image):
        features = self.student["backbone"](image) - self.teacher["backbone"](image)
        return self.head(features.mean((2, 3)))


def test_two_encoders_of_one_host_have_a_name_each(tmp_path, batches):
    teacher = probe(name="teacher", encoder="teacher.backbone", targets=["H"])
    student = probe(encoder="student.backbone", targets=["H"])
    run = trainer(tmp_path, teacher, student, max_epochs=1)
    run.fit(Pair(), batches, batches)
    shown = {key for key in run.progress_bar_metrics if "position" in key}
    assert shown == {"teacher/position/H/spc", "position/H/spc"}
    assert {"teacher/position/H/mae", "position/H/mae"} <= run.callback_metrics.keys()
    assert teacher.state_key != probe(encoder="teacher.backbone", targets=["H"]).state_key
    with pytest.raises(MisconfigurationException, match=r"encoder='student.backbone' or encoder='teacher.backbone'"):
        trainer(tmp_path, probe()).fit(Pair(), batches, batches)
