"""An encoder by name, with its weights."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padprobe.errors import check_name
from padprobe.network.padding import PADDING_MODES, set_padding

LIBRARIES = ("torchvision", "smp", "timm")


def load_encoder(
    name: str,
    weights: str | Path = "untrained",
    padding: str = "zeros",
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """An encoder in evaluation mode.

    Args:
        name: ``"torchvision:vgg16"``, ``"smp:resnet34"`` (``"smp:tu-NAME"``: one of timm's under smp's interface),
            ``"timm:convnext_tiny"``, or the path of a Lightning checkpoint (``.ckpt``), whose ``encoder`` submodule is
            taken with the weights and padding it was trained with.
        weights: ``"untrained"``, a name that the library knows (``"IMAGENET1K_V1"``, ``"imagenet"``, a timm tag;
            torchvision's names for smp's encoders of the same name), which may be downloaded, or the path of a state
            dict (loaded as weights only; head weights may be missing).
        padding: how it pads, see :func:`~padprobe.set_padding`; "zeros" leaves it as it was built or trained.
        seed: of untrained weights; the global random state is left alone.
        options: further arguments of the library's constructor, such as smp's ``config`` and ``out_channels`` of a VGG.

    Raises:
        ValueError: for an unknown library, architecture, weight or padding name (with the nearest valid ones) and for
            a weights file that does not fit the architecture.
    """
    check_name(padding, PADDING_MODES, "padding mode")
    if str(name).endswith(".ckpt"):
        _check_weights(weights, [])
        encoder = _from_checkpoint(Path(name))
    else:
        library, _, architecture = str(name).partition(":")
        if not architecture:
            raise ValueError(
                f"unknown encoder {name!r}: expected 'torchvision:NAME', 'smp:NAME', 'timm:NAME' or a .ckpt file"
            )
        check_name(library, LIBRARIES, "encoder library")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = _BUILD[library](architecture, weights, options or {})
    if Path(weights).is_file():
        _load_state(encoder, Path(weights))
    if padding != "zeros":
        set_padding(encoder, padding)
    return encoder.eval()


def _check_weights(weights: str | Path, known: list[str]) -> str | None:
    """A weight name that the library knows, or None where its own weights are not wanted."""
    if weights == "untrained" or Path(weights).is_file():
        return None
    check_name(str(weights), ["untrained", *known, "a file's path"], "weights")
    return str(weights)


def _torchvision(architecture: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    check_name(architecture, models.list_models(models), "torchvision encoder")
    name = _check_weights(weights, list(_torchvision_weights(architecture)))
    return models.get_model(architecture, weights=name, **options)


def _torchvision_weights(architecture: str) -> dict[str, Any]:
    """torchvision's weights of an architecture by name; none where it does not have it."""
    from torchvision import models

    known = architecture in models.list_models(models)
    return dict(models.get_model_weights(architecture).__members__) if known else {}


def _smp(architecture: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    from segmentation_models_pytorch.encoders import encoders, get_encoder

    if architecture.startswith("tu-"):  # any of timm's under smp's interface
        tag = _timm_tag(architecture[3:], weights)
        name = f"{architecture}.{tag}" if tag else architecture
        return get_encoder(name, weights=True if tag else None, **options)
    check_name(architecture, encoders, "smp encoder")
    theirs = _torchvision_weights(architecture)  # smp's VGG, ResNet and DenseNet are torchvision's
    known = list(encoders[architecture].get("pretrained_settings", {}))
    pretrained = _check_weights(weights, [*known, *theirs])
    if pretrained and options:
        raise ValueError(f"options {options} change the encoder, so the weights {pretrained!r} would not fit it")
    if pretrained in theirs:
        encoder = _smp(architecture, "untrained", {})
        encoder.load_state_dict(theirs[pretrained].get_state_dict(progress=False, check_hash=True))
        return encoder
    if pretrained:
        return get_encoder(architecture, weights=pretrained)
    # as get_encoder() does, which would drop the options
    entry = encoders[architecture]
    arguments = {**entry["params"], "depth": 5, "output_stride": 32, **options}
    return _vgg(entry["encoder"], arguments) if architecture.startswith("vgg") else entry["encoder"](**arguments)


def _vgg(encoder_class: Any, arguments: dict[str, Any]) -> nn.Module:
    """An smp VGG, initialised as torchvision does, without the 120 million weights of the head.

    smp builds torchvision's whole network and deletes the head: two seconds and half a gigabyte for nothing.
    """
    with torch.device("meta"):
        encoder = encoder_class(**arguments, init_weights=False)
    encoder.to_empty(device="cpu")
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # VGG's convolutions have one
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
    return encoder


def _timm(architecture: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    import timm

    tag = _timm_tag(architecture, weights)
    name = f"{architecture}.{tag}" if tag else architecture
    return timm.create_model(name, pretrained=tag is not None, features_only=True, **options)


def _timm_tag(architecture: str, weights: str | Path) -> str | None:
    """The tag of the weights of a timm model; None where its own are not wanted."""
    import timm

    check_name(architecture, timm.list_models(), "timm encoder")
    return _check_weights(weights, [tag.partition(".")[2] for tag in timm.list_pretrained(architecture)])


_BUILD = {"torchvision": _torchvision, "smp": _smp, "timm": _timm}


def _read(path: Path) -> Any:
    """A file of tensors and plain values; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read {str(path)!r} as weights: {error}") from error


def _load_state(encoder: nn.Module, path: Path) -> None:
    """Loads a state dict; every convolution must find its weights."""
    state = _read(path)
    state = state.get("state_dict", state)
    expected = encoder.state_dict()
    wrong = [k for k, v in state.items() if k in expected and v.shape != expected[k].shape]
    convolutions = [k for k, v in expected.items() if v.ndim == 4]
    missing = [k for k in convolutions if k not in state]
    if wrong or missing:
        what = "has other shapes for" if wrong else "lacks"
        raise ValueError(
            f"weights {str(path)!r} do not fit {type(encoder).__name__}: the file {what} "
            f"{', '.join((wrong or missing)[:3])} ({len(wrong or missing)} in all); "
            f"its keys look like {', '.join(list(state)[:3])}"
        )
    nn.Module.load_state_dict(encoder, state, strict=False)


def _from_checkpoint(path: Path) -> nn.Module:
    """The ``encoder`` of the LightningModule that a checkpoint was written from."""
    if not path.is_file():
        raise ValueError(f"no checkpoint {str(path)!r}")
    checkpoint = _read(path)
    hparams = dict(checkpoint.get("hyper_parameters", {}))
    class_path = hparams.pop("_class_path", None)
    if class_path is None:
        raise ValueError(
            f"checkpoint {str(path)!r} does not say which LightningModule wrote it: train with `padprobe fit`, or "
            "build the module yourself and give probe_encoder its encoder"
        )
    from lightning.pytorch import LightningModule

    module_name, _, class_name = class_path.rpartition(".")
    try:
        task = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"checkpoint {str(path)!r} was written by {class_path}, which is not here: {error}") from error
    if not (isinstance(task, type) and issubclass(task, LightningModule)):
        raise ValueError(f"checkpoint {str(path)!r} names {class_path}, which is no LightningModule")
    hparams.pop("_instantiator", None)
    if "encoder_weights" in hparams:  # what the training started from, and may be gone
        hparams["encoder_weights"] = "untrained"
    module = task(**hparams)
    module.load_state_dict(checkpoint["state_dict"])
    return module.get_submodule(find_encoder(module))


def find_encoder(module: nn.Module) -> str:
    """The dotted name of the encoder in a task's network: the submodule called ``encoder`` or ``backbone`` that lies
    least deep; "" (the whole module) where there is none."""
    names = [name for name, _ in module.named_modules() if name.split(".")[-1] in ("encoder", "backbone")]
    return min(names, key=lambda name: name.count("."), default="")


def untrained_twin(encoder: nn.Module, seed: int) -> nn.Module:
    """A copy of any encoder with new weights, on the CPU: the control for what training added.

    Convolutions and linear layers are drawn as torchvision draws a VGG's convolutions (He's normal distribution, zero
    biases); every other layer that can is reset. Padding stays as it is. The global random state is left alone.

    Raises:
        ValueError: naming the layer whose own parameters would stay as they were trained.
    """
    twin = copy.deepcopy(encoder).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in twin.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
            elif next(layer.parameters(recurse=False), None) is not None:
                raise ValueError(
                    f"layer {name!r} ({type(layer).__name__}) has parameters and no reset_parameters(), so that a twin "
                    "would keep them as trained: give probe_encoder a `twin` that builds the network, or untrained=0"
                )
    return twin
