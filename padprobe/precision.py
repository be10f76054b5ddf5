"""Full float32 arithmetic for a while, whatever the user has allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SETTINGS: list[Any] = [  # torch >= 2.9
    getattr(backend, operation)
    for backend in (torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn)
    for operation in ("matmul", "conv", "rnn")
    if hasattr(getattr(backend, operation, None), "fp32_precision")
]


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """A context without TF32, without bfloat16 in float32 products and without autocast; then all is as it was.

    TF32 keeps 10 bits of a product's factors. It would change SPC by about 0.001, and a ridge readout by more, because
    it solves equations in the sums of such products.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with full_float32(torch.device("cpu")):
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'medium'
        >>> torch.set_float32_matmul_precision("highest")
    """
    new = [(setting, setting.fp32_precision) for setting in _SETTINGS]
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch does not read the old setting where the user has made new ones
        matmul = None
    try:
        cudnn = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        cudnn = None
    # old and new settings agree, so that an encoder may read either
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for setting in _SETTINGS:
        setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for setting, value in new:
            setting.fp32_precision = "none"
            if setting.fp32_precision != value:  # it does not come from the setting of the whole backend
                setting.fp32_precision = value
