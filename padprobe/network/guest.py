"""Runs an encoder that belongs to somebody else, and leaves it as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def evaluation(encoder: nn.Module) -> Iterator[None]:
    """A context in evaluation mode without the host's hooks; then every module is as before.

    Hooks of torch itself stay: weight norms and lazy layers need them. What a forward pass changes in a module's
    attributes, puts into its lists, dictionaries and sets, or draws from its generators, is taken back.
    """
    modules = list(encoder.modules())
    before = [dict(vars(module)) for module in modules]
    contents = [(v, v.copy()) for kept in before for v in kept.values() if isinstance(v, (list, dict, set, deque))]
    values = [value for attributes in before for value in attributes.values()]
    drawn = [(v, v.get_state()) for v in values if isinstance(v, torch.Generator)]
    drawn_by_numpy = [(v.bit_generator, v.bit_generator.state) for v in values if isinstance(v, np.random.Generator)]
    try:
        for module in modules:
            module.training = False
            for hooks in (getattr(module, name) for name in _HOOKS):
                for key in [key for key, hook in hooks.items() if not _is_of_torch(hook)]:
                    del hooks[key]
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        for generator, state in drawn:
            generator.set_state(state)
        for bits, numbers in drawn_by_numpy:
            bits.state = numbers
        for container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, (list, deque)) else container.update(content)


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def copied_state(encoder: nn.Module, with_data: bool = False) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, on the meta device without their data.

    A module that has two names is copied under one, and a tensor that two modules share is copied once:
    ``functional_call(..., tie_weights=False)`` then replaces each once, and leaves no copy in the network.
    """
    copies: dict[Tensor, Tensor] = {}
    state: dict[str, Tensor] = {}
    for prefix, module in encoder.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor not in copies:
                copies[tensor] = tensor.detach().clone() if with_data else tensor.detach().to("meta")
            state[f"{prefix}.{name}" if prefix else name] = copies[tensor]
    return state


def image_channels(encoder: nn.Module) -> int:
    """How many channels an encoder's images have: those of its first convolution, or 3."""
    return next((m.in_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)), 3)
