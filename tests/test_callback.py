import copy
import io
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from padprobe import PositionProbeCallback, spearman
from padprobe.maps import position_maps
from padprobe.readout.online import small_readout
from padprobe.stages import align
from tests.conftest import Host, trainer

TARGETS = ("H", "V", "G", "HS", "VS")


def probe(**options):
    return PositionProbeCallback(**({"image_size": 32, "grid": 16} | options))


def test_scores_reach_loggers_and_callback_metrics(tmp_path, host, batches):
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tb", "")]
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="position/H/spc", mode="max")
    run = trainer(tmp_path, probe(), checkpoint, logger=loggers)
    run.fit(host, batches, batches)
    for target in TARGETS:
        assert -1 <= run.callback_metrics[f"position/{target}/spc"] <= 1
        assert 0 < run.callback_metrics[f"position/{target}/mae"] < 1
        assert 0 < run.callback_metrics[f"position/{target}/nmae"] < 3
    logged = pd.read_csv(tmp_path / "csv" / "metrics.csv")
    assert logged["position/H/spc"].notna().sum() == 2
    assert list((tmp_path / "tb").glob("events*"))
    assert checkpoint.best_model_score is not None


def test_a_padded_encoder_shows_position_and_an_unpadded_one_does_not(tmp_path, batches):
    scores = {}
    for padding in (1, 0):
        torch.manual_seed(0)
        run = trainer(tmp_path, probe(), max_epochs=20)
        run.fit(Host(padding), batches, batches)
        scores[padding] = run.callback_metrics["position/G/spc"].item()
    assert scores[1] > 0.4
    assert abs(scores[0]) < 0.1


def test_logged_scores_are_those_of_the_readout_on_every_validation_image(tmp_path, host, batches):
    guest = probe()
    run = trainer(tmp_path, guest)
    run.fit(host, batches, batches)
    images = batches.dataset.tensors[0]
    host.eval()
    with torch.no_grad():
        x, aligned = images, []
        for i, layer in enumerate(host.encoder):
            x = layer(x)
            if i in (2, 5):  # the ReLU outputs before the pooling layer and at the end
                aligned.append(align(x, 16))
        maps = guest._probes[""].readout.eval()(torch.cat(aligned, 1))
    expected = spearman(maps, guest._probes[""].readout.maps).mean(0)
    logged = torch.stack([run.callback_metrics[f"position/{t}/spc"] for t in TARGETS])
    assert torch.allclose(logged.double(), expected, atol=1e-5)


def test_its_state_travels_in_the_checkpoint(tmp_path, host, batches):
    first = probe()
    run = trainer(tmp_path, first)
    run.fit(host, batches, batches)
    run.save_checkpoint(tmp_path / "end.ckpt")
    torch.load(tmp_path / "end.ckpt", weights_only=True)  # plain tensors and numbers
    second = probe()
    again = trainer(tmp_path, second)
    again.validate(Host(), batches, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert torch.equal(first._probes[""].readout.weight, second._probes[""].readout.weight)
    for key in ("position/H/spc", "position/G/mae"):
        assert again.callback_metrics[key] == pytest.approx(run.callback_metrics[key].item(), abs=1e-6)


def test_resuming_goes_on_where_the_run_stopped(tmp_path, batches, monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)  # Lightning restores no random state
    torch.manual_seed(0)
    whole = probe()
    trainer(tmp_path, whole, max_epochs=4).fit(Host(), batches, batches)

    class SaveAfterTwo(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    torch.manual_seed(0)
    trainer(tmp_path, SaveAfterTwo(), probe(), max_epochs=4).fit(Host(), batches, batches)
    resumed = probe()
    trainer(tmp_path, resumed, max_epochs=4).fit(Host(), batches, batches, ckpt_path=tmp_path / "two.ckpt")
    assert torch.allclose(whole._probes[""].readout.weight, resumed._probes[""].readout.weight, atol=1e-6)
    assert resumed._probes[""].steps == whole._probes[""].steps


def test_it_trains_on_every_nth_batch_only(tmp_path, host, batches):
    guest = probe(every_n_steps=4)
    trainer(tmp_path, guest, max_epochs=2).fit(host, batches, batches)
    assert guest._batches == 12
    assert guest._probes[""].steps == 3


def test_two_probes_and_two_fits_are_fine(tmp_path, host, batches):
    guests = [probe(targets=["V", "G"]), probe(encoder="encoder", stages=["2"], targets=["H"])]
    assert guests[0].state_key != guests[1].state_key
    for _ in range(2):
        trainer(tmp_path, *guests, max_epochs=1).fit(host, batches, batches)
    assert guests[0]._probes[""].steps == 12
    assert not any(m._forward_hooks for m in host.modules())


def test_two_probes_that_would_log_under_the_same_key_are_refused(tmp_path, host, batches):
    with pytest.raises(MisconfigurationException, match="read out G, H"):
        trainer(tmp_path, probe(targets=["H", "G"]), probe()).fit(host, batches, batches)


def test_a_host_whose_validation_goes_around_the_encoder_is_left_alone(tmp_path, batches):
    class Around(Host):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 0.0)

    run = trainer(tmp_path, probe())
    with pytest.warns(UserWarning, match="did not arrive"):
        run.fit(Around(), batches, batches)
    assert not any(key.endswith(("spc", "mae")) for key in run.callback_metrics)
    assert run.callback_metrics["position/trouble"] == 6


def test_features_that_are_not_finite_do_not_spoil_the_readout(tmp_path, host, batches):
    class Overflowing(Host):
        def forward(self, image):
            return super().forward(image * torch.inf if self.global_step == 2 else image)

        def optimizer_step(self, *args, **kwargs):
            kwargs.get("optimizer_closure", args[-1])()
            self.zero_grad()

    guest = probe()
    trainer(tmp_path, guest).fit(Overflowing(), batches)
    assert guest._probes[""].steps == 12
    assert all(p.isfinite().all() for p in guest._probes[""].readout.state_dict().values())


class Frozen(Host):
    """Learns nothing."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_delta_is_what_training_changed(tmp_path, batches):
    """Of a host that learns nothing, on the same batch, it is 0; of one that loses its padding it is what was there."""

    class Losing(Frozen):
        def on_train_batch_end(self, *args):
            self.encoder[0].padding = self.encoder[4].padding = (0, 0)

    one = DataLoader(torch.utils.data.Subset(batches.dataset, range(16)), 16)
    changes = {}
    for kind in (Frozen, Losing):
        torch.manual_seed(0)
        run = trainer(tmp_path, probe(), max_epochs=2)
        run.fit(kind(), one, batches)
        changes[kind] = {k: v.item() for k, v in run.callback_metrics.items() if k.endswith(("before", "delta"))}
    assert len(changes[Frozen]) == 2 * len(TARGETS)
    for target in TARGETS:
        before, delta = f"position/{target}/before", f"position/{target}/delta"
        assert changes[Frozen][delta] == pytest.approx(0, abs=1e-5)
        assert changes[Frozen][before] == pytest.approx(changes[Losing][before], abs=1e-6)
        if target in ("H", "V", "G"):
            assert changes[Losing][before] > 0.4
            assert changes[Losing][before] + changes[Losing][delta] == pytest.approx(0, abs=0.15)


def test_before_is_of_the_first_batch_before_the_first_step(tmp_path, batches):
    """Against the host's own features by hand, BatchNorm in training mode as in the step."""
    torch.manual_seed(0)
    host, x, aligned = Host(), batches.dataset.tensors[0][:8], []
    with torch.no_grad():
        for i, layer in enumerate(copy.deepcopy(host.encoder)):
            x = layer(x)
            if i in (2, 5):
                aligned.append(align(x, 16))
    expected = small_readout(torch.cat(aligned, 1), TARGETS, position_maps(32))
    run = trainer(tmp_path, probe(), max_epochs=1)
    run.fit(host, batches, batches)
    logged = [run.callback_metrics[f"position/{target}/before"].item() for target in TARGETS]
    assert logged == pytest.approx(expected.tolist(), abs=1e-5)


def test_of_batches_too_small_for_it_there_is_no_delta(tmp_path, host, batches):
    run = trainer(tmp_path, probe(), max_epochs=1)
    run.fit(host, DataLoader(batches.dataset, 3), batches)
    assert "position/H/spc" in run.callback_metrics
    assert "position/H/delta" not in run.callback_metrics


@pytest.mark.parametrize("options", [{}, {"readout": "ridge", "kernel_size": 1}], ids=["posenet", "ridge"])
def test_each_stage_alone_is_what_a_probe_of_that_stage_gives(tmp_path, batches, options):
    scores = []
    for guest in (probe(each_stage=True, **options), probe(encoder="encoder", stages=["2"], **options)):
        torch.manual_seed(0)
        run = trainer(tmp_path, guest)
        run.fit(Host(), batches, batches)
        scores.append(run.callback_metrics)
    for target in TARGETS:
        for metric in ("spc", "mae", "nmae"):
            alone = scores[1][f"position/{target}/{metric}"].item()
            assert scores[0][f"position/{target}/f1/{metric}"].item() == pytest.approx(alone, abs=1e-5)
    assert {"position/H/f2/spc", "position/H/spc"} <= scores[0].keys()
    assert "position/H/f3/spc" not in scores[0]


def test_a_ridge_readout_reads_position_without_an_optimizer(tmp_path, batches):
    scores = {}
    for padding in (1, 0):
        torch.manual_seed(0)
        run = trainer(tmp_path, probe(readout="ridge", kernel_size=1))
        run.fit(Host(padding), batches, batches)
        scores[padding] = run.callback_metrics["position/G/spc"].item()
    assert scores[1] > 0.4
    assert abs(scores[0]) < 0.1


def test_the_progress_bar_has_one_line_of_it(tmp_path, host, batches):
    run = trainer(tmp_path, probe(targets=["G", "H"], each_stage=True))
    run.fit(host, batches, batches)
    assert [key for key in run.progress_bar_metrics if key.startswith("position/")] == ["position/G/spc"]


def test_predicted_maps_go_to_the_loggers_that_take_images(tmp_path, host, batches, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = [
        CSVLogger(tmp_path, "csv", ""),
        TensorBoardLogger(tmp_path, "tb", ""),
        WandbLogger(save_dir=tmp_path, offline=True),
    ]
    guest = probe(targets=["H", "V"])
    trainer(tmp_path, guest, logger=loggers).fit(host, batches, batches)
    loggers[2].experiment.finish()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"position/maps", "position/content_loss"} <= set(events.Tags()["images"])
    assert len(events.Images("position/maps")) == 2
    shown = np.array(Image.open(io.BytesIO(events.Images("position/maps")[-1].encoded_image_string)))[..., 0]
    assert shown.shape == (32, 64)
    host.eval()
    with torch.no_grad():
        x, aligned = batches.dataset.tensors[0], []
        for i, layer in enumerate(host.encoder):
            x = layer(x)
            if i in (2, 5):
                aligned.append(align(x, 16))
        maps = guest._probes[""].readout(torch.cat(aligned, 1)).mean(0)
    assert np.abs(shown / 255 - torch.cat(list(maps), 1).numpy()).max() < 0.01
    assert {path.name.split("_")[0] for path in tmp_path.rglob("wandb/**/media/images/position/*.png")} == {
        "maps",
        "content",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "encodr"}, "unknown encoder 'encodr'; did you mean 'encoder'"),
        ({"stages": ["22"]}, "unknown layer '22'"),
        ({"encoder": "head"}, "cannot run on a 32 x 32 image|no stages found"),
    ],
)
def test_what_does_not_exist_is_named_before_training(tmp_path, host, batches, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, probe(**options)).fit(host, batches, batches)
    assert host.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["H", "Q"]}, "unknown target 'Q'"),
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"kernel_size": 2}, "kernel_size is 2"),
        ({"stages": "layer1"}, "'auto' or a list"),
        ({"readout": "lasso"}, "unknown readout 'lasso'"),
        ({"readout": "ridge", "depth": 2}, "depth is 2 and padding 0; a ridge readout has depth 1"),
        ({"readout": "ridge", "forget": 0.0}, "forget is 0.0; expected a number above 0"),
    ],
)
def test_bad_options_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        probe(**options)


def test_a_stage_that_does_not_arrive_is_warned_about_and_the_host_goes_on(tmp_path, batches):
    class Moody(Host):
        def forward(self, image):
            return self.head(torch.zeros(len(image), 16)) if self.global_step == 3 else super().forward(image)

    guest = probe(encoder="encoder")
    with pytest.warns(UserWarning, match="did not arrive"):
        trainer(tmp_path, guest, max_epochs=1).fit(Moody(), batches, batches)
    assert guest._probes[""].steps == 5


def test_validating_without_trained_readouts_says_so(tmp_path, host, batches):
    run = trainer(tmp_path, probe())
    with pytest.warns(UserWarning, match="untrained"):
        run.validate(host, batches, verbose=False)
    assert not any(key.startswith("position/") for key in run.callback_metrics)


def test_it_works_on_features_in_half_precision(tmp_path, host, batches):
    guest = probe()
    run = trainer(tmp_path, guest, precision="bf16-mixed")
    run.fit(host, batches, batches)
    assert guest._probes[""].readout.weight.dtype == torch.float32
    assert "position/H/spc" in run.callback_metrics


def test_a_host_with_no_submodule_called_encoder_is_probed_as_a_whole(tmp_path, batches):
    class Plain(Host):
        def __init__(self):
            super().__init__()
            self.body = self.encoder
            del self.encoder

        def forward(self, image):
            return self.head(self.body(image).mean((2, 3)))

    run = trainer(tmp_path, probe(), max_epochs=1)
    run.fit(Plain(), batches, batches)
    assert "position/H/spc" in run.callback_metrics
    assert isinstance(Plain().body, nn.Sequential)


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
    assert guest._probes[""].steps == 0


def test_before_is_not_claimed_of_a_host_that_is_trained_already(tmp_path, host, batches):
    first = trainer(tmp_path, max_epochs=1)
    first.fit(host, batches)
    first.save_checkpoint(tmp_path / "end.ckpt")
    run = trainer(tmp_path, probe(), max_epochs=2)
    run.fit(host, batches, batches, ckpt_path=tmp_path / "end.ckpt")
    assert "position/H/spc" in run.callback_metrics
    assert "position/H/before" not in run.callback_metrics


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
    trainer(tmp_path, guest, Watch(), **options).fit(Host(), batches)
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
        (Small, {"encoder": "encoder", "stages": ["2", "6"]}, "stage '6' is 1 x 1 at image_size 32"),
    ],
)
def test_what_cannot_be_probed_is_said_before_training(tmp_path, batches, make, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, probe(**options)).fit(make(), batches)


def test_a_run_that_fails_leaves_no_hook(tmp_path, batches):
    class Failing(Host):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no memory")

    host = Failing()
    with pytest.raises(RuntimeError, match="no memory"):
        trainer(tmp_path, probe()).fit(host, batches)
    assert not any(m._forward_hooks for m in host.modules())


def test_the_host_can_be_copied_and_saved_while_it_trains(tmp_path, batches):
    class Copying(Host):
        def on_train_batch_start(self, batch, batch_idx):
            torch.save(self.encoder, tmp_path / "encoder.pt")
            copy.deepcopy(self.encoder)(batch[0][:2])

    guest = probe(encoder="encoder")
    trainer(tmp_path, guest, max_epochs=1).fit(Copying(), batches)
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
