"""Which device a model gets, and what is said where CUDA does not work."""

from __future__ import annotations

import ctypes
import sys
import warnings
from pathlib import Path
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
    ("module", "nvrtc", "says"),
    [
        (None, None, r"CuPy is not installed.*losart\[cuda12x\]"),
        (cupy(0), None, "there is no CUDA device"),
        (cupy(CUDARuntimeError("no driver")), None, "no working driver and device.*no driver"),
        (cupy(1, "75"), None, "the device has compute capability 7.5; 8.0 is needed"),
        (cupy(1), no_nvrtc, "CuPy finds no NVRTC"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, tiny_checkpoint, module, nvrtc, says):
    monkeypatch.setattr(losart.backends, "has_nvidia_device", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(losart.backends, "prebuilt_for", lambda capability: False)
    if nvrtc is not None:
        monkeypatch.setattr(losart.backends, "nvrtc_version", nvrtc)
    with pytest.raises(DeviceError, match="device 'cuda' does not work here: .*" + says):
        losart.load(tiny_checkpoint, device="cuda")
    with pytest.warns(UserWarning, match="running on the CPU: .*" + says):
        assert losart.load(tiny_checkpoint, device="auto").device == "cpu"


@pytest.mark.parametrize("module", [None, cupy(0), cupy(CUDARuntimeError("no driver"))])
def test_nothing_is_said_where_there_is_no_device(monkeypatch, tiny_checkpoint, module):
    monkeypatch.setattr(losart.backends, "has_nvidia_device", lambda: False)
    monkeypatch.setitem(sys.modules, "cupy", module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert losart.load(tiny_checkpoint, device="auto").device == "cpu"
    with pytest.raises(DeviceError, match="device 'cuda' does not work here: "):
        losart.load(tiny_checkpoint, device="cuda")


@pytest.mark.parametrize(
    ("file", "expected"), [("nvidia0", True), ("nvidia12", True), ("nvidiactl", False), ("dxg", False)]
)
def test_a_device_is_known_by_its_file(tmp_path, file, expected):
    (tmp_path / file).touch()
    assert losart.backends.has_nvidia_device(tmp_path, driver="no_such_library.so") == expected


@pytest.mark.parametrize(("status", "devices", "expected"), [(0, 1, True), (0, 0, False), (100, 1, False)])
def test_a_device_is_known_by_its_driver(monkeypatch, tmp_path, status, devices, expected):
    def device_count(count: Any) -> int:
        count._obj.value = devices
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetCount=device_count)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert losart.backends.has_nvidia_device(tmp_path) == expected


def test_a_library_that_is_no_driver_is_no_device(tmp_path):
    libraries = [
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line
    ]
    assert not losart.backends.has_nvidia_device(tmp_path, driver=libraries[0])


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
