"""Which device a model gets, and what is said where CUDA does not work."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

import losart
import losart.backends
from losart.errors import DeviceError


class CUDARuntimeError(RuntimeError):
    pass


def cupy(devices: int | Exception, capability: str = "90") -> Any:
    """Stands in for CuPy."""

    def count() -> int:
        if isinstance(devices, Exception):
            raise devices
        return devices

    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CUDARuntimeError)
    device = SimpleNamespace(compute_capability=capability)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=lambda: device))


def no_nvrtc() -> None:
    raise DeviceError("CuPy finds no NVRTC")


@pytest.mark.parametrize(
    ("found", "nvrtc", "says"),
    [
        (None, None, r"CuPy is not installed.*losart\[cuda12x\]"),
        (cupy(0), None, "there is no CUDA device"),
        (cupy(CUDARuntimeError("no driver")), None, "no working driver and device.*no driver"),
        (cupy(1, "75"), None, "the device has compute capability 7.5; 8.0 is needed"),
        (cupy(1), no_nvrtc, "CuPy finds no NVRTC"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, tiny_checkpoint, found, nvrtc, says):
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(losart.backends, "prebuilt_for", lambda capability: False)
    if nvrtc is not None:
        monkeypatch.setattr(losart.backends, "nvrtc_version", nvrtc)
    with pytest.raises(DeviceError, match="device 'cuda' does not work here: .*" + says):
        losart.load(tiny_checkpoint, device="cuda")
    with pytest.warns(UserWarning, match="running on the CPU: .*" + says):
        assert losart.load(tiny_checkpoint, device="auto").device == "cpu"


@pytest.mark.parametrize("capability", ["80", "90", "120"])
def test_nothing_is_missing(monkeypatch, capability):
    monkeypatch.setitem(sys.modules, "cupy", cupy(1, capability))
    monkeypatch.setattr(losart.backends, "nvrtc_version", lambda: (12, 9))
    assert losart.backends.cuda_problem() is None


def test_prebuilt_kernels_stand_in_for_nvrtc(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy(1, "90"))
    monkeypatch.setattr(losart.backends, "nvrtc_version", no_nvrtc)
    monkeypatch.setattr(losart.backends, "prebuilt_for", lambda capability: capability == (9, 0))
    assert losart.backends.cuda_problem() is None
    monkeypatch.setitem(sys.modules, "cupy", cupy(1, "86"))
    assert losart.backends.cuda_problem() == "CuPy finds no NVRTC"
