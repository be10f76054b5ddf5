import multiprocessing

import pytest
import torch
from torch import backends, nn

from padprobe import probe_encoder
from padprobe.precision import full_float32

SMALL = {"image_size": 16, "grid": 8, "epochs": 1, "limit_train": 8, "limit_test": 2, "untrained": 0, "targets": ["H"]}
HOSTS = [
    "pass",
    "torch.set_float32_matmul_precision('medium')",
    "backends.cuda.matmul.allow_tf32 = True",
    "backends.cudnn.allow_tf32 = False",
]
if hasattr(backends.cudnn, "fp32_precision"):
    HOSTS += [
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.cudnn.conv.fp32_precision = 'ieee'",
        "backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "backends.fp32_precision = 'tf32'",
        "backends.cudnn.fp32_precision = 'tf32'",
    ]
OPERATIONS = ["cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"]
OLD = ["backends.cuda.matmul.allow_tf32", "backends.cudnn.allow_tf32", "torch.get_float32_matmul_precision()"]
NEW = [f"backends.{name}fp32_precision" for name in ("", "cudnn.", *(f"{name}." for name in OPERATIONS))]


def settings() -> dict:
    values = {}
    for name in [*OLD, *NEW] if hasattr(backends.cudnn, "fp32_precision") else OLD:
        try:
            values[name] = eval(name)
        except RuntimeError:
            values[name] = "torch refuses to read it"
    return values


def check_host(host: str) -> None:
    exec(host)
    before = settings()
    try:
        with full_float32(torch.device("cpu")):
            inside = settings()
            assert [inside[name] for name in OLD] == [False, False, "highest"]
            assert all(inside.get(name, "ieee") == "ieee" for name in NEW[2:]), inside
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert settings() == before


@pytest.mark.filterwarnings("ignore:.*fork")
def test_whatever_the_user_has_set_is_off_inside_and_restored():
    """In processes of their own: torch remembers in which way a setting was made."""
    context = multiprocessing.get_context("fork")
    for host in HOSTS:
        process = context.Process(target=check_host, args=(host,))
        process.start()
        process.join()
        assert process.exitcode == 0, host


def test_the_probe_measures_in_full_float32_and_restores_what_the_user_has_set():
    seen = []

    class Looks(nn.Conv2d):
        def forward(self, image):
            if not image.is_meta:
                seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
                seen[-1] += (torch.is_autocast_enabled("cpu"), super().forward(image).dtype)
            return super().forward(image)

    encoder = nn.Sequential(Looks(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            probe_encoder(encoder, stages=["0", "2"], **SMALL)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen[1:]) == {("highest", False, False, torch.float32)}  # the first finds what padding reaches


def test_products_are_exact_inside():
    """On a CPU with bfloat16 or TF32 products this fails without the context; elsewhere both are exact."""
    a = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("medium")
    try:
        with full_float32(torch.device("cpu")):
            assert torch.allclose(a @ a, (a.double() @ a.double()).float(), rtol=1e-5)
    finally:
        torch.set_float32_matmul_precision("highest")
