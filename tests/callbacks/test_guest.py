"""The guest is invisible: the host is, bit for bit, what it is without it, whatever its Trainer does."""

import contextlib
import random
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from padprobe import PositionProbeCallback
from tests.conftest import Host, equal, trainer


def probe(**options):
    return PositionProbeCallback(**({"image_size": 32, "grid": 8} | options))


class Scheduled(Host):
    """Dropout, BatchNorm, noise from three random streams, AdamW and a schedule."""

    def training_step(self, batch, batch_idx):
        image, label = batch
        image = image + 0.01 * (torch.randn_like(image) + random.random() + np.random.rand())  # noqa: NPY002
        return super().training_step((image.float(), label), batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Manual(Scheduled):
    """Manual optimization with two optimizers, the encoder run twice a step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.encoder.parameters(), 0.1), torch.optim.Adam(self.head.parameters(), 0.01)]


class Compiled(Scheduled):
    def __init__(self):
        super().__init__()
        self.encoder = torch.compile(self.encoder)


class Keep(Callback):
    """Keeps what a run leaves behind."""

    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, module):
        trainer.save_checkpoint(self.path / "end.ckpt")
        if trainer.is_global_zero:
            streams = {"python": random.getstate()[1], "numpy": np.random.get_state()[1].tolist()}  # noqa: NPY002
            torch.save(streams | {"torch": torch.get_rng_state()}, self.path / "streams.pt")


SETTINGS = {
    "float32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "gradient accumulation": {"accumulate_grad_batches": 4},
    "gradient clipping": {"gradient_clip_val": 0.1},
    "manual optimization": {"host": Manual},
    "compiled": {"host": Compiled},
    "checkpoints, early stopping, averages": {"with": ["checkpoint", "stop", "average"]},
    "several probes": {"guests": 3},
    "validation in mid-epoch": {"val_check_interval": 2},
    "ridge, each stage": {"options": {"readout": "ridge", "kernel_size": 1, "each_stage": True}},
    "two processes": {"strategy": "ddp_spawn", "devices": 2},
}
OTHERS = {
    "checkpoint": lambda folder: ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2),
    "stop": lambda folder: EarlyStopping("val_loss", patience=1),
    "average": lambda folder: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
}


def fit(folder, guests, setting):
    setting = dict(setting)
    seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(52, 3, 32, 32, generator=generator), torch.randint(2, (52,), generator=generator))
    host = setting.pop("host", Scheduled)()
    others = [OTHERS[name](folder) for name in setting.pop("with", [])]
    options = {"logger": CSVLogger(folder, "csv", ""), "log_every_n_steps": 1, "devices": 1, **setting}
    fitting = trainer(folder, *guests, LearningRateMonitor(), *others, Keep(folder), **options)
    fitting.fit(host, DataLoader(data, 8, shuffle=True), DataLoader(data, 16))
    return (
        torch.load(folder / "end.ckpt", weights_only=True),
        torch.load(folder / "streams.pt"),
        pd.read_csv(folder / "csv" / "metrics.csv"),
    )


SLOW = {"compiled", "two processes"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SETTINGS])
def test_the_host_is_bit_for_bit_what_it_is_without_the_guest(name, tmp_path):
    setting = dict(SETTINGS[name])
    count, options = setting.pop("guests", 1), setting.pop("options", {})
    more = [{"targets": ["H", "G"]}, {"targets": ["V"], "every_n_steps": 2}, {"targets": ["HS"], "encoder": "encoder"}]
    guests = [probe(**chosen, **options) for chosen in more[:count]]
    ours, our_streams, our_log = fit(tmp_path / "with", guests, setting)
    theirs, their_streams, their_log = fit(tmp_path / "without", [], setting)

    assert len([ours["callbacks"].pop(key) for key in list(ours["callbacks"]) if "Probe" in key]) == count
    assert ours.keys() == theirs.keys()
    assert ours["callbacks"].keys() == theirs["callbacks"].keys()
    for part in ours.keys() - {"callbacks"}:
        assert equal(ours[part], theirs[part]), part
    assert equal(our_streams, their_streams)
    of_host = our_log.drop(columns=[c for c in our_log if c.startswith("position/")]).dropna(how="all")
    pd.testing.assert_frame_equal(of_host[sorted(of_host)], their_log[sorted(their_log)], check_exact=True)
    assert our_log["position/H/spc"].notna().any()


# ---------------------------------------------------------------------- resuming


class Stateful(DataLoader):
    """Goes on after the batch at which its state was taken."""

    given = skip = 0

    def __iter__(self):
        skip, self.skip = self.skip, 0
        for self.given, batch in enumerate(super().__iter__(), 1):
            if self.given > skip:
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.skip = state["given"] % len(self)


class Killed(Exception):
    pass


class Dies(Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.at:
            raise Killed


class Logged(Callback):
    """Keeps what validations log, by step."""

    def __init__(self):
        self.scores = {}

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self.scores[trainer.global_step] = {k: v.item() for k, v in metrics if k.startswith("position/")}


class Plain(Host):
    """Without Dropout: Lightning restores no random state."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Identity()


OPTIONS = [{"depth": 2, "each_stage": True, "every_n_steps": 3}, {"readout": "ridge", "kernel_size": 1, "forget": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=["posenet", "ridge"])
def test_a_run_killed_in_mid_epoch_goes_on_exactly(options, tmp_path, batches):
    """Killed in the second of three epochs of six batches; resumed from the checkpoint of the last step."""

    def fit(guest, *others, **resume):
        torch.manual_seed(0)
        log = Logged()
        with contextlib.suppress(Killed):
            run = trainer(tmp_path, guest, log, *others, max_epochs=3)
            run.fit(Plain(), Stateful(batches.dataset, 8), batches, **resume)
        return {name: p.state_dict() for name, p in guest._probes.items()}, log.scores

    state, scores = fit(probe(**options))
    fit(probe(**options), Dies(9), ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_last=True))
    again, later = fit(probe(**options), ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert equal(again, state)
    assert sorted(scores) == [6, 12, 18]
    assert later == {step: scores[step] for step in (12, 18)}
    assert "position/V/change" in later[18]


def fitted(tmp_path, host, batches, **options):
    """The checkpoint of a run with a probe."""
    run = trainer(tmp_path, probe(**options), max_epochs=1)
    run.fit(host, batches, batches)
    run.save_checkpoint(tmp_path / "end.ckpt")
    return tmp_path / "end.ckpt"


@pytest.mark.parametrize("options", [{}, {"readout": "ridge", "kernel_size": 1}], ids=["posenet", "ridge"])
def test_its_checkpoint_is_of_use_without_padprobe(options, tmp_path, host, batches):
    checkpoint = fitted(tmp_path, host, batches, **options)
    program = f"""
import sys
sys.modules["padprobe"] = None
import torch
from lightning.pytorch import Trainer
from tests.conftest import Host
state = torch.load({str(checkpoint)!r}, weights_only=True)
assert any(key.startswith("PositionProbeCallback") for key in state["callbacks"])
data = torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.zeros(8).long())
trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Host(), torch.utils.data.DataLoader(data, 4), ckpt_path={str(checkpoint)!r}, weights_only=True)
print("fitted", trainer.global_step)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=".", check=False)
    assert "fitted 8" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"kernel_size": 1}, "kernel_size was 3 and is 1"),
        ({"readout": "ridge", "kernel_size": 1}, "readout was 'posenet' and is 'ridge'; kernel_size was 3"),
        ({"grid": 16}, "grid was 8 and is 16"),
        ({"lr": 0.2, "every_n_steps": 3}, "every_n_steps was 1 and is 3; lr was 0.1 and is 0.2"),
    ],
)
def test_other_options_on_resuming_are_named(now, message, tmp_path, host, batches):
    checkpoint = fitted(tmp_path, host, batches)
    run = trainer(tmp_path, probe(**now))
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(host, batches, batches, ckpt_path=checkpoint)


def test_other_targets_on_resuming_start_anew_and_say_so(tmp_path, host, batches):
    checkpoint = fitted(tmp_path, host, batches)
    run = trainer(tmp_path, probe(targets=["V"]))
    with pytest.warns(UserWarning, match="has no readouts for .*'V'.* it has readouts for"):
        run.fit(host, batches, batches, ckpt_path=checkpoint)


# ---------------------------------------------------------------------- two processes


class Still(Plain):
    """Learns nothing and has no BatchNorm, so that its features are the same in any number of processes, whose batches
    are together those of one: of 16, the last of 2."""

    def __init__(self):
        super().__init__()
        self.encoder[1] = nn.Identity()

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        images = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(images, torch.zeros(50).long())
        return DataLoader(data, 16 // world, sampler=DistributedSampler(data, world, rank, shuffle=False))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Moody(Still):
    """No encoder is called in the first batch, the second process's neither in the second nor in validation, where it
    has more batches."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0 or (batch_idx == 1 and self.global_rank == 1):
            return self.head.weight.sum() * 0
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.global_rank == 0:
            super().validation_step(batch, batch_idx)

    def val_dataloader(self):
        data = TensorDataset(torch.rand(8, 3, 32, 32), torch.zeros(8).long())
        return DataLoader(data, 2 if self.global_rank else 4)


class Readouts(Callback):
    """Keeps each process's readouts and scores."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, module):
        guests = [c for c in trainer.callbacks if isinstance(c, PositionProbeCallback)]
        readouts = {
            f"{i} {name}": p.current().state_dict() for i, c in enumerate(guests) for name, p in c._probes.items()
        }
        images = {
            f"{i} {name}": len(s.per_image()["spc"]) for i, c in enumerate(guests) for name, s in c._scores.items()
        }
        scores = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("position/")}
        path = self.path / f"{trainer.world_size}-{trainer.global_rank}.pt"
        torch.save({"readouts": readouts, "images": images, "scores": scores}, path)


def fit_in(devices, folder, make, **loaders):
    torch.manual_seed(0)
    guests = [
        probe(targets=["H", "G"]),
        probe(targets=["V"], readout="ridge", kernel_size=1, every_n_steps=2),
        probe(targets=["HS"], depth=2, each_stage=True),
    ]
    strategy = DDPStrategy(start_method="spawn", find_unused_parameters=True, process_group_backend="gloo")
    run = trainer(folder, *guests, Readouts(folder), devices=devices, strategy=strategy if devices > 1 else "auto")
    run.fit(make(), **loaders)
    return [torch.load(folder / f"{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


def test_two_processes_are_one(tmp_path):
    """51 validation images: the processes see one of them twice, and score it once."""
    images = torch.rand(51, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(images, torch.zeros(51).long())
    one, *both = (
        kept for devices in (1, 2) for kept in fit_in(devices, tmp_path, Still, val_dataloaders=DataLoader(data, 8))
    )
    assert equal(both[0], both[1])
    assert one["images"] == both[0]["images"] == dict.fromkeys(one["images"], 51)
    for name, value in one["readouts"]["0 "].items():
        assert torch.allclose(value.float(), both[0]["readouts"]["0 "][name].float(), atol=1e-5), name
    for target in ("H", "G"):
        for metric, tolerance in (("mae", 1e-5), ("nmae", 1e-4), ("spc", 1e-3)):
            key = f"position/{target}/{metric}"
            assert one["scores"][key] == pytest.approx(both[0]["scores"][key], abs=tolerance)
    assert one["scores"]["position/V/mae"] == pytest.approx(both[0]["scores"]["position/V/mae"], abs=1e-2)


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters.*")
def test_processes_that_differ_in_what_they_see_do_not_wait_for_ever(tmp_path):
    first, second = fit_in(2, tmp_path, Moody)
    assert equal(first, second)
    assert first["images"] == dict.fromkeys(first["images"], 4)
    assert first["scores"]["position/trouble"] > 0


# ---------------------------------------------------------------------- hosts that are not ours


class ResNet(LightningModule):
    """A torchvision classifier."""

    def __init__(self):
        super().__init__()
        import torchvision

        self.model = torchvision.models.resnet18(num_classes=2)

    def forward(self, image):
        return self.model(image)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class UNet(ResNet):
    """A segmentation network of smp."""

    def __init__(self):
        LightningModule.__init__(self)
        import segmentation_models_pytorch as smp

        self.net = smp.Unet("resnet18", encoder_weights=None, classes=1)

    def forward(self, image):
        return self.net(image).mean((2, 3)).repeat(1, 2)


class ConvNeXt(ResNet):
    """Features of timm."""

    def __init__(self):
        LightningModule.__init__(self)
        import timm

        self.backbone = timm.create_model("convnext_atto", pretrained=False, features_only=True)
        self.head = nn.LazyLinear(2)

    def forward(self, image):
        return self.head(self.backbone(image)[-1].mean((2, 3)))


class FromDict(LightningModule):
    """Batches are dictionaries, and forward takes no image."""

    def __init__(self):
        super().__init__()
        self.inner = Host().encoder
        self.head = nn.Linear(16, 2)

    def forward(self, batch):
        return self.head(self.inner(batch["picture"]).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch), batch["label"])

    def validation_step(self, batch, batch_idx):
        self(batch)

    configure_optimizers = ResNet.configure_optimizers


@pytest.mark.parametrize(
    ("make", "encoder", "stages"),
    [(ResNet, None, 5), (UNet, "net.encoder", 5), (ConvNeXt, None, 4), (FromDict, "inner", 2)],
)
def test_hosts_that_are_not_ours(make, encoder, stages, tmp_path):
    images, labels = torch.rand(8, 3, 64, 64), torch.randint(2, (8,))
    data = list(zip(images, labels, strict=True))
    if make is FromDict:
        data = [{"picture": image, "label": label} for image, label in data]
    host = make()
    if make is ConvNeXt:
        host(images)  # the lazy head
    guest = probe(encoder=encoder, image_size=64, each_stage=True)
    run = trainer(tmp_path, guest, max_epochs=1)
    run.fit(host, DataLoader(data, 4), DataLoader(data, 4))
    assert sorted(guest._channels) == ["", *(f"f{i + 1}" for i in range(stages))]
    for name in ("", *(f"f{i + 1}/" for i in range(stages))):
        assert -1 <= run.callback_metrics[f"position/G/{name}spc"] <= 1
    assert "position/trouble" not in run.callback_metrics
