"""What hosts and their Trainers do that a guest must live with."""

import copy
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from padprobe import PositionProbeCallback
from padprobe.callbacks.online import by_view
from tests.conftest import Frozen, Host, trainer


def probe(**options):
    return PositionProbeCallback(**({"image_size": 32, "grid": 16} | options))


@pytest.mark.parametrize("options", [{}, {"readout": "ridge", "kernel_size": 1}], ids=["posenet", "ridge"])
def test_validating_a_checkpoint_and_then_fitting_is_fine(tmp_path, host, batches, options):
    """Lightning validates in inference mode, whose tensors cannot learn."""
    first = trainer(tmp_path, probe(**options))
    first.fit(host, batches, batches)
    first.save_checkpoint(tmp_path / "end.ckpt")
    run = trainer(tmp_path, probe(**options), max_epochs=4)
    run.validate(host, batches, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert run.callback_metrics["position/G/mae"] == pytest.approx(
        first.callback_metrics["position/G/mae"].item(), abs=1e-5
    )
    run.fit(host, batches, batches)
    run.validate(host, batches, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert run.callback_metrics["position/G/mae"] == pytest.approx(
        first.callback_metrics["position/G/mae"].item(), abs=1e-5
    )


@pytest.mark.parametrize("kind", [list, dict])
def test_images_of_all_validation_loaders_are_scored(tmp_path, batches, kind):
    class Many(Host):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    loaders = [batches, DataLoader(batches.dataset, 48)]
    guest = probe()
    run = trainer(tmp_path, guest, max_epochs=1)
    run.fit(Many(), batches, loaders if kind is list else {"a": loaders[0], "b": loaders[1]})
    assert len(guest._scores[""].per_image()["spc"]) == 96


@pytest.mark.parametrize("options", [{}, {"readout": "ridge", "kernel_size": 1}], ids=["posenet", "ridge"])
@pytest.mark.parametrize("scale", [float("nan"), 1e12, 1e30])
def test_one_bad_batch_does_not_spoil_a_readout(tmp_path, batches, options, scale):
    """Counted, and the scores are about those without it."""

    class Bad(Frozen):
        def __init__(self):
            super().__init__()
            self.encoder[1] = nn.Identity()  # a BatchNorm would be spoilt by itself

        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                with torch.no_grad():
                    self(batch[0] * scale)
                return self.head.weight.sum() * 0
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    run = trainer(tmp_path, probe(**options), max_epochs=8)
    with pytest.warns(UserWarning, match="1 had features that are not finite or beyond half precision"):
        run.fit(Bad(), batches, batches)
    assert run.callback_metrics["position/H/spc"] > 0.3


def test_stages_of_different_images_are_trouble(tmp_path, batches):
    class Again(Host):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.encoder[:3](batch[0][:4])
            return loss

    guest = probe(encoder="encoder")
    with pytest.warns(UserWarning, match="did not arrive"):
        trainer(tmp_path, guest, max_epochs=1).fit(Again(), batches, batches)
    assert not guest._probes


def test_start_is_not_claimed_of_a_host_that_is_trained_already(tmp_path, host, batches):
    first = trainer(tmp_path, max_epochs=1)
    first.fit(host, batches)
    first.save_checkpoint(tmp_path / "end.ckpt")
    run = trainer(tmp_path, probe(), max_epochs=2)
    run.fit(host, batches, batches, ckpt_path=tmp_path / "end.ckpt")
    assert "position/H/spc" in run.callback_metrics
    assert "position/H/start" not in run.callback_metrics


def test_another_host_gets_readouts_of_its_own(tmp_path, batches):
    guest = probe()
    for _ in range(2):
        run = trainer(tmp_path, guest, max_epochs=1)
        host = Host()
        run.fit(host, batches, batches)
        assert guest._probes[""].steps == 6
    again = trainer(tmp_path, guest)
    again.validate(copy.deepcopy(host), batches, verbose=False)  # such as one loaded from a checkpoint
    assert again.callback_metrics["position/H/mae"] == pytest.approx(
        run.callback_metrics["position/H/mae"].item(), abs=1e-5
    )


@pytest.mark.parametrize(
    ("options", "late"),
    [({"max_epochs": 1}, 2), ({"max_epochs": 3}, 6), ({"max_epochs": 3, "max_steps": 9}, 3), ({"max_steps": 6}, 2)],
)
def test_the_last_third_of_the_training_is_at_a_tenth_of_the_rate(tmp_path, batches, options, late):
    rates = []

    class Watch(Callback):
        def on_train_batch_end(self, *args):
            rates.append(guest._probes[""].optimizer.param_groups[0]["lr"])

    guest = probe()
    trainer(tmp_path, guest, Watch(), **options).fit(Host(), batches, batches)
    assert rates == pytest.approx([0.1] * (len(rates) - late) + [0.01] * late)


def test_a_network_that_is_built_late_is_probed(tmp_path, batches):
    class Late(Host):
        def setup(self, stage):
            self.encoder = Host().encoder

    class Later(Host):
        def configure_model(self):
            self.encoder = Host().encoder

    for kind in (Late, Later):
        host = kind()
        del host.encoder
        run = trainer(tmp_path, probe(encoder="encoder"), max_epochs=1)
        run.fit(host, batches, batches)
        assert "position/H/spc" in run.callback_metrics
        trainer(tmp_path, probe(encoder="encoder")).validate(host, batches, verbose=False)


class OfDicts(Host):
    def __init__(self):
        super().__init__()
        self.inner = self.encoder
        del self.encoder

    def forward(self, batch):
        return self.inner(batch["picture"])


class Small(Host):
    def __init__(self):
        super().__init__()
        self.encoder.append(nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (OfDicts, {}, "must name a module whose forward takes images .* parts are .'dropout', 'head', 'inner'"),
        (Small, {"encoder": "encoder", "stages": ["2", "6"]}, "stage '6' is 1 x 1 for images of 32 x 32"),
    ],
)
def test_what_cannot_be_probed_is_said_before_training(tmp_path, batches, make, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, probe(**options)).fit(make(), batches, batches)


def test_a_run_that_fails_leaves_no_hook(tmp_path, batches):
    class Failing(Host):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no memory")

    host = Failing()
    with pytest.raises(RuntimeError, match="no memory"):
        trainer(tmp_path, probe()).fit(host, batches, batches)
    assert not any(m._forward_hooks for m in host.modules())


def test_the_host_can_be_copied_and_saved_while_it_trains(tmp_path, batches):
    class Copying(Host):
        def on_train_batch_start(self, batch, batch_idx):
            torch.save(self.encoder, tmp_path / "encoder.pt")
            copy.deepcopy(self.encoder)(batch[0][:2])

    guest = probe(encoder="encoder")
    trainer(tmp_path, guest, max_epochs=1).fit(Copying(), batches, batches)
    assert guest._probes[""].steps == 6


def test_looking_for_stages_changes_nothing_in_the_host(tmp_path):
    class Counting(Host):
        calls, grid = 0, None

        def forward(self, image):
            self.calls += 1
            self.grid = torch.zeros_like(image) if self.grid is None else self.grid
            return super().forward(image * random.random() + np.random.rand() + torch.rand(1))  # noqa: NPY002

    host = Counting()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    probe().resolve(host)
    assert (host.calls, host.grid) == (0, None)
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())


@pytest.mark.parametrize("case", ["empty loader", "after the last epoch"])
def test_a_fit_in_which_no_validation_comes_is_refused(tmp_path, host, batches, case):
    late = {"check_val_every_n_epoch": 3} if case == "after the last epoch" else {}
    loader = batches if late else DataLoader([])
    with pytest.raises(MisconfigurationException, match="this fit has none"):
        trainer(tmp_path, probe(), max_epochs=2, **late).fit(host, batches, loader)
    assert not any(m._forward_hooks for m in host.modules())


@pytest.mark.parametrize("readout", ["posenet", "ridge"])
@pytest.mark.parametrize("width", [12, 24])
def test_a_layer_that_gets_another_width_is_trouble_and_the_host_goes_on(tmp_path, batches, width, readout):
    class Changing(Host):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.encoder[4] = nn.Conv2d(8, width, 3, padding=1)
                self.head = nn.Linear(width, 2)

    run = trainer(tmp_path, probe(stages=["2", "5"], readout=readout), max_epochs=2)
    with pytest.warns(UserWarning, match=r"channels, not 24"):
        run.fit(Changing(), batches, batches)
    assert run.callback_metrics["position/trouble"] > 0


def test_frames_of_videos_are_dropped_with_their_video():
    """Four samples of three frames: the frames of one sample are neighbours, and so a view is every third row."""
    frames = torch.arange(12)
    assert by_view(frames, 4, torch.zeros(4, 3, 3, 8, 8))[:, :2].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert by_view(frames, 4, torch.zeros(4, 3, 8, 8).flatten(1)).tolist() == frames.view(3, 4).tolist()
