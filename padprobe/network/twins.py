"""Untrained twins of an encoder: the control for what the training added."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from padprobe.network.embedding import as_learned

_DRAWN = re.compile(r"pos|token|relative|latent")  # names of parameters that transformers draw
_ADVICE = "pass probe_encoder a `twin` function that builds an untrained network, or untrained=0"


@torch.no_grad()
def untrained_twin(encoder: nn.Module, seed: int) -> nn.Module:
    """A copy of an encoder with new random weights, on the CPU. It is the control for what the training added.

    In a network without LayerNorm, convolutions and linear layers are drawn as torchvision draws a VGG's convolutions
    (He's normal distribution, zero biases). In one with LayerNorm, as transformers have, convolutions are reset, and
    linear layers, embeddings, tokens and position tables are normal with standard deviation 0.02, cut at two of them,
    as timm and torchvision draw them. All other layers with a ``reset_parameters`` are reset. Weight and spectral norms
    are taken off before and put back afterwards. Padding, the mode of position embeddings, hooks and the global random
    state stay.

    Raises:
        ValueError: for parameters or statistics that would stay trained, and for lazy layers without weights, by name.

    Example:
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> torch.equal(untrained_twin(encoder, 0)[0].weight, encoder[0].weight)
        False
    """
    for name, parameter in encoder.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet: show the encoder one batch first")
    # weight_norm and spectral_norm of the old style leave a computed weight on the layer, which cannot be copied
    computed = (v for m in encoder.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    twin = copy.deepcopy(encoder, {id(value): value.detach().clone() for value in computed}).cpu()
    attentive = any(isinstance(layer, nn.LayerNorm) for layer in twin.modules())
    # what is drawn must reach the position embeddings themselves
    with as_learned(twin), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old style is deprecated
        put_back = [norm for layer in twin.modules() for norm in _take_off_norms(layer)]
        # first with another seed: an untrained encoder may have been drawn as this twin is
        for each in (2**31 - 1 - seed, seed):
            torch.manual_seed(each)
            for name, layer in twin.named_modules():
                _reset(name, layer, attentive)
            if each != seed:
                _refuse_kept(encoder, twin)
        for norm in put_back:
            norm()
    return twin


def _take_off_norms(layer: nn.Module) -> list[Callable[[], object]]:
    """Takes weight and spectral norms off a layer, of either style; returns what puts them back."""
    put_back: list[Callable[[], object]] = []
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
            put_back.append(partial(nn.utils.weight_norm, layer, hook.name, hook.dim))
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
            put_back.append(partial(_put_back_spectral_norm, layer, hook))
    for name in list(layer.parametrizations) if parametrize.is_parametrized(layer) else ():  # type: ignore[arg-type]
        steps: list[Any] = list(layer.parametrizations[name])  # type: ignore[index, union-attr, arg-type]
        kind = type(steps[0]).__name__
        if len(steps) > 1 or kind not in ("_WeightNorm", "_SpectralNorm"):
            raise ValueError(
                f"{type(layer).__name__}.{name} has the parametrization {kind}, which a twin cannot draw: {_ADVICE}"
            )
        own_class = {k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__")}
        # a copy shares its class with the encoder, and removing takes the weight from the class
        layer.__class__ = type(type(layer).__name__, type(layer).__bases__, own_class)
        parametrize.remove_parametrizations(layer, name)
        if kind == "_WeightNorm":
            put_back.append(partial(parametrizations.weight_norm, layer, name, steps[0].dim))
        else:
            rounds, eps, dim = (getattr(steps[0], key, None) for key in ("n_power_iterations", "eps", "dim"))
            options = (name, rounds or 1, eps or 1e-12, dim)
            put_back.append(partial(parametrizations.spectral_norm, layer, *options))
    return put_back


def _put_back_spectral_norm(layer: nn.Module, removed: SpectralNorm) -> None:
    """Of the old style, which starts with a poor estimate of the norm: more rounds, as the new style does."""
    nn.utils.spectral_norm(layer, removed.name, 15, removed.eps, removed.dim)
    hook = next(hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, SpectralNorm))
    setattr(layer, hook.name, hook.compute_weight(layer, do_power_iteration=True).detach())
    hook.n_power_iterations = removed.n_power_iterations


def _reset(name: str, layer: nn.Module, attentive: bool) -> None:
    """Draws a layer's own parameters anew."""
    reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
    if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) and not (
        attentive and isinstance(layer, nn.modules.conv._ConvNd)
    ):
        if attentive:
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
        else:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Embedding):
        nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
        if layer.padding_idx is not None:
            layer.weight[layer.padding_idx] = 0
    elif callable(reset):
        reset()
    else:
        buffers = dict(layer.named_buffers(recurse=False))
        if {"weight", "bias", "running_mean", "running_var"} <= set(buffers):  # a frozen BatchNorm
            for key, value in buffers.items():
                value.fill_(float(key in ("weight", "running_var")))
        for key, parameter in layer.named_parameters(recurse=False):
            if _DRAWN.search(f"{name}.{key}".lower().rpartition(".")[2]):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            elif key.endswith(("bias", "biases")):
                nn.init.zeros_(parameter)
            else:
                raise ValueError(
                    f"layer {name!r} ({type(layer).__name__}) has parameters and no reset_parameters(), so a twin "
                    f"would keep the trained values of {key!r}: {_ADVICE}"
                )


def _refuse_kept(encoder: nn.Module, twin: nn.Module) -> None:
    """Raises ValueError for values that are those of the encoder, unless they are constant, as ones of a norm are."""
    trained = dict(_values(encoder))
    kept = [
        name
        for name, value in _values(twin)
        if name in trained and torch.equal(value, trained[name].cpu()) and value.numel() and value.min() != value.max()
    ]
    if kept:
        raise ValueError(
            f"a twin of {type(encoder).__name__} would keep the trained values of {', '.join(kept[:5])} "
            f"({len(kept)} in all): {_ADVICE}"
        )


def _values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that a state dict keeps, of real numbers."""
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield name, value
