import copy
import io
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
from padprobe.callbacks.change import small_readout
from padprobe.maps import position_maps
from padprobe.network.tap import align
from tests.conftest import Frozen, Host, trainer

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


def test_its_checkpoint_keeps_the_layout_of_earlier_versions(tmp_path, host, batches):
    """Otherwise readouts of runs that are going on could not be resumed."""
    expected = {
        "posenet": {"readout", "momenta", "steps"},
        "ridge": {"gram", "sums", "images", "steps"},
    }
    for readout, keys in expected.items():
        run = trainer(tmp_path, probe(readout=readout, kernel_size=1, targets=["H"], each_stage=True), max_epochs=1)
        run.fit(host, batches, batches)
        run.save_checkpoint(tmp_path / "end.ckpt")
        saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
        state = saved["PositionProbeCallback{'encoder': None, 'stages': 'auto', 'targets': ['H']}"]
        assert state.keys() == {"options", "size", "probes", "batches", "start"}
        assert set(state["options"]) == {
            *("readout", "targets", "kernel_size", "depth", "padding", "grid", "image_size"),
            *("each_stage", "every_n_steps", "lr", "forget", "seed", "layout"),
        }
        assert state["probes"].keys() == {"", "f1", "f2"}
        assert all(online.keys() == keys for online in state["probes"].values())


def test_every_hook_can_be_found_by_its_name():
    """A search for `def on_validation_epoch_end` finds it: no hook is another one under a second name."""
    hooks = {name: hook for name, hook in vars(PositionProbeCallback).items() if hasattr(Callback, name)}
    assert {"setup", "on_fit_start", "on_validation_epoch_end", "on_test_batch_end"} <= hooks.keys()
    for name, hook in hooks.items():
        if callable(hook) and not name.startswith("__"):
            assert hook.__name__ == name


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
    with pytest.raises(MisconfigurationException, match=r"same keys .position/G, position/H.: give one of them a name"):
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
    trainer(tmp_path, guest).fit(Overflowing(), batches, batches)
    assert guest._probes[""].steps == 12
    assert all(p.isfinite().all() for p in guest._probes[""].readout.state_dict().values())


def test_change_is_what_training_changed(tmp_path, batches):
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
        changes[kind] = {k: v.item() for k, v in run.callback_metrics.items() if k.endswith(("start", "change"))}
    assert len(changes[Frozen]) == 2 * len(TARGETS)
    for target in TARGETS:
        start, change = f"position/{target}/start", f"position/{target}/change"
        assert changes[Frozen][change] == pytest.approx(0, abs=1e-5)
        assert changes[Frozen][start] == pytest.approx(changes[Losing][start], abs=1e-6)
        if target in ("H", "V", "G"):
            assert changes[Losing][start] > 0.4
            assert changes[Losing][start] + changes[Losing][change] == pytest.approx(0, abs=0.15)


def test_start_is_of_the_first_batch_before_the_first_step(tmp_path, batches):
    """Against the host's own features by hand, BatchNorm in training mode as in the step."""
    torch.manual_seed(0)
    host, x, aligned = Host(), batches.dataset.tensors[0][:8], []
    with torch.no_grad():
        for i, layer in enumerate(copy.deepcopy(host.encoder)):
            x = layer(x)
            if i in (2, 5):
                aligned.append(align(x, 16))
    expected = small_readout(torch.cat(aligned, 1), position_maps(32)).mean(0)
    run = trainer(tmp_path, probe(), max_epochs=1)
    run.fit(host, batches, batches)
    logged = [run.callback_metrics[f"position/{target}/start"].item() for target in TARGETS]
    assert logged == pytest.approx(expected.tolist(), abs=1e-5)


def test_of_batches_too_small_for_it_there_is_no_change(tmp_path, host, batches):
    run = trainer(tmp_path, probe(), max_epochs=1)
    run.fit(host, DataLoader(batches.dataset, 3), batches)
    assert "position/H/spc" in run.callback_metrics
    assert "position/H/change" not in run.callback_metrics


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
        ({"stages": "layer1"}, "'each_block' or a list"),
        ({"readout": "lasso"}, "unknown readout 'lasso'"),
        ({"readout": "ridge", "depth": 2}, "a ridge readout has depth 1 and no padding; got depth 2 and padding 0"),
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
