"""The cache of compiled kernels: what it saves, and that nothing on the disk can break it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from losart.errors import DeviceError
from losart.kernels_cu import compiler
from losart.kernels_cu.compiler import (
    ELF,
    architecture_of,
    cache_folder,
    cached_cubin,
    compile_cubin,
    nvrtc_version,
)

SOURCE = ("source", "kernel.cu", ("-DN=1",), "sm_80")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache's folder."""
    monkeypatch.setenv("LOSART_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def compiled(monkeypatch) -> list[tuple]:
    """What was compiled, by a compiler that gives back what it is given."""
    calls: list[tuple] = []

    def compile_cubin(*inputs):
        calls.append(inputs)
        return ELF + repr(inputs).encode() * 1000, ""

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 9))
    return calls


def test_same_is_compiled_once(folder, compiled):
    first = cached_cubin(*SOURCE)
    assert cached_cubin(*SOURCE) == first
    assert compiled == [SOURCE]
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


def test_whatever_changes_the_cubin_is_compiled_again(folder, compiled, monkeypatch):
    cached_cubin(*SOURCE)
    others = [
        ("other", *SOURCE[1:]),
        (*SOURCE[:2], ("-DN=2",), "sm_80"),
        (*SOURCE[:2], ("-DN=1", "-DN=2"), "sm_80"),
        (*SOURCE[:3], "sm_90a"),
    ]
    for other in others:
        cached_cubin(*other)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    cached_cubin(*SOURCE)
    assert compiled == [SOURCE, *others, SOURCE]


def no_nvrtc() -> None:
    raise DeviceError("CuPy finds no NVRTC")


def test_without_nvrtc_what_another_version_left_is_taken(folder, compiled, monkeypatch):
    whole = cached_cubin(*SOURCE)
    (left,) = folder.iterdir()
    left.with_name(left.name.replace("12.9", "12.8")).write_bytes(b"damaged")
    monkeypatch.setattr(compiler, "nvrtc_version", no_nvrtc)
    assert cached_cubin(*SOURCE) == whole
    with pytest.raises(DeviceError, match=r"kernel\.cu is not prebuilt with -DN=2 -arch=sm_80, and CuPy"):
        cached_cubin(*SOURCE[:2], ("-DN=2",), "sm_80")
    monkeypatch.setattr(compiler, "cache_folder", lambda: None)
    with pytest.raises(DeviceError, match="not prebuilt"):
        cached_cubin(*SOURCE)
    assert compiled == [SOURCE]


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_missing_nvrtc_says_what_to_install(monkeypatch, error):
    def missing():
        raise error("libnvrtc.so.12\nwas not found\n")

    monkeypatch.setattr(compiler, "_nvrtc", missing)
    with pytest.raises(
        DeviceError, match=r"no NVRTC .*libnvrtc.so.12 was not found\).*pip install 'losart\[cuda12x\]'"
    ):
        nvrtc_version()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content[:100] + b"?" + content[101:],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
    ],
)
def test_damaged_file_is_compiled_anew(folder, compiled, damage):
    whole = cached_cubin(*SOURCE)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert cached_cubin(*SOURCE) == whole
    assert cached_cubin(*SOURCE) == whole
    assert len(compiled) == 2


def test_file_that_is_no_cubin_is_compiled_anew(folder, compiled, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile_cubin", lambda *inputs: (b"nothing", ""))
        cached_cubin(*SOURCE)
    assert cached_cubin(*SOURCE).startswith(ELF)


def test_folder_that_cannot_be_written_is_no_error(folder, compiled):
    folder.write_text("a file where the folder should be")
    assert cached_cubin(*SOURCE) == cached_cubin(*SOURCE)
    assert len(compiled) == 2


def test_folder_in_the_files_place_is_no_error(folder, compiled):
    whole = cached_cubin(*SOURCE)
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    assert cached_cubin(*SOURCE) == whole
    assert [*folder.iterdir()] == [path]


def test_interrupt_leaves_nothing_behind(folder, compiled, monkeypatch):
    def interrupt(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached_cubin(*SOURCE)
    assert [*folder.iterdir()] == []


def test_writers_at_once_leave_whole_files(folder, compiled):
    whole = cached_cubin(*SOURCE)
    (path,) = folder.iterdir()
    content, done = path.read_bytes(), threading.Event()

    def write():
        for _ in range(50):
            compiler._write(path, whole)

    def read():
        seen = 0
        while not done.is_set() or not seen:
            assert path.read_bytes() == content
            seen += 1

    with ThreadPoolExecutor(6) as threads:
        readers = [threads.submit(read) for _ in range(2)]
        writers = [threads.submit(write) for _ in range(4)]
        for writer in writers:
            writer.exception()
        done.set()
    for thread in writers + readers:
        thread.result()
    assert [*folder.iterdir()] == [path]


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("LOSART_CACHE_DIR", "/own")
    assert cache_folder() == Path("/own/kernels")
    monkeypatch.setenv("LOSART_CACHE_DIR", "")
    assert cache_folder() == Path("/caches/losart/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/me/.cache/losart/kernels")


def test_no_home_is_no_error(compiled, monkeypatch):
    def no_home():
        raise RuntimeError("no home directory")

    for name in ("LOSART_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cached_cubin(*SOURCE) == cached_cubin(*SOURCE)
    assert len(compiled) == 2


def test_cubin_from_the_disk_is_the_compilers(folder):
    try:
        compiler.nvrtc_version()
    except DeviceError as error:
        pytest.skip(str(error))
    inputs = ('extern "C" __global__ void kernel(int *x) { *x = N; }', *SOURCE[1:])
    cubin, _ = compile_cubin(*inputs)
    # Its header says where its last table ends: nothing is cut off.
    at = int.from_bytes(cubin[32:40], "little")
    entry, entries = (int.from_bytes(cubin[i : i + 2], "little") for i in (54, 56))
    assert len(cubin) == at + entry * entries
    assert cubin == cached_cubin(*inputs) == cached_cubin(*inputs)
    (path,) = folder.iterdir()
    assert path.read_bytes().startswith(cubin)


def test_architectures():
    assert architecture_of((8, 0)) == "sm_80"
    assert architecture_of((8, 9)) == "sm_89"
    assert architecture_of((9, 0)) == "sm_90a"
    assert architecture_of((10, 0)) == "sm_100"
    assert architecture_of((12, 1)) == "sm_121"
