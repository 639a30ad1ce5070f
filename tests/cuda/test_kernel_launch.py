"""How kernels are loaded and launched, with a driver that only notes what it is told."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest

import losart.kernels_cu.launch
import losart.kernels_cu.tensor_map
from losart.backends.cuda.matmul_plans import (
    gated_matmul_plan,
    hopper_matmul_plans,
    matmul_plan,
    usual_splits,
)
from losart.backends.cuda.plans import sparse_plan
from losart.backends.cuda.variants import CARDS
from losart.config.precision import Precision
from losart.errors import DeviceError
from losart.kernels_cu import kernel
from losart.kernels_cu.constants import MOST_SHARING, SHARED_ALIGNMENT
from losart.kernels_cu.launch import Kernel
from losart.kernels_cu.tensor_map import TensorMap, tensor_map

SHARED_LIMIT = 8  # the attribute's number


class RefusedError(Exception):
    """As CuPy's for what the driver says."""


class Driver:
    """Stands in for CuPy and the driver: two devices, of compute capability 9.0 and 8.6."""

    stream = 99

    def __init__(self) -> None:
        self.device = 0
        self.loaded: list[Any] = []
        self.limits: list[Any] = []
        self.launches: list[Any] = []
        self.maps: list[Any] = []
        self.driver = SimpleNamespace(
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=SHARED_LIMIT,
            funcGetAttribute=lambda attribute, function: {SHARED_LIMIT: 48 << 10}[attribute],
            funcSetAttribute=lambda *call: self.limits.append(call),
            CUDADriverError=RefusedError,
        )
        self.runtime = SimpleNamespace(getDevice=lambda: self.device, driverGetVersion=lambda: 13000)
        self.status = 0
        self.function = SimpleNamespace(Module=lambda: Module(self))

    def get_current_stream(self) -> Any:
        return SimpleNamespace(ptr=self.stream)

    def cuLaunchKernelEx(self, config: Any, handle: Any, pointers: Any, extra: None) -> int:
        values = [ctypes.string_at(pointer, 8) for pointer in pointers]
        self.launches.append((config._obj, handle.value, values))
        return self.status

    def cuTensorMapEncodeTiled(self, made: Any, *told: Any) -> int:
        # As the driver, which takes no other places for its maps.
        assert ctypes.addressof(made._obj) % 64 == 0 and ctypes.sizeof(made._obj) == 128
        made._obj.opaque[0] = 42  # within the bytes of a parameter that are looked at
        self.maps.append(told)
        return self.status

    def cuGetErrorName(self, status: int, name: Any) -> None:
        name._obj.value = b"CUDA_ERROR_OF_A_TEST"

    def Device(self, device: int) -> Any:
        return SimpleNamespace(compute_capability=("90", "86")[device])


class Module:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def load(self, cubin: bytes) -> None:
        if b"refused" in cubin:
            raise RefusedError("CUDA_ERROR_NO_BINARY_FOR_GPU")
        self.driver.loaded.append(cubin)

    def get_function(self, name: str) -> Any:
        return Function(self.driver)


class Function:
    ptr = 1234

    def __init__(self, driver: Driver) -> None:
        self.driver = driver


@pytest.fixture
def driver(monkeypatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=driver))
    monkeypatch.setitem(sys.modules, "cupy.cuda", driver)
    for module in (losart.kernels_cu.launch, losart.kernels_cu.tensor_map):
        monkeypatch.setattr(module, "driver", lambda: driver)
    tensor_map.cache_clear()
    yield driver
    tensor_map.cache_clear()


def test_a_launch_tells_the_driver_all(driver):
    launch = Kernel("kernel", Function(driver), overlap=True)
    array = SimpleNamespace(data=SimpleNamespace(ptr=1 << 40))
    launch((7, 8), 96, array, -3, 1.5, None, ctypes.c_double(0.1), shared=100)
    config, handle, values = driver.launches[0]
    assert handle == Function.ptr and list(config.grid) == [7, 8, 1] and list(config.block) == [96, 1, 1]
    assert config.shared == 100 and config.stream == Driver.stream and config.attribute_count == 1
    assert config.attributes[0].id == 6 and config.attributes[0].value[0] == 1
    kinds = (ctypes.c_uint64, ctypes.c_int, ctypes.c_float, ctypes.c_uint64, ctypes.c_double)
    found = [kind.from_buffer_copy(value).value for kind, value in zip(kinds, values, strict=True)]
    assert found == [1 << 40, -3, 1.5, 0, 0.1]
    Kernel("kernel", Function(driver), overlap=False)((1,), 32)
    assert driver.launches[1][0].attribute_count == 0


def test_a_map_tells_the_driver_of_the_matrix_and_is_passed_by_value(driver):
    for _ in range(2):
        found = tensor_map(1 << 40, 300, 72, 128)
    assert len(driver.maps) == 1 and isinstance(found, TensorMap)
    kind, rank, address, sizes, strides, box, every, *modes = driver.maps[0]
    assert (kind, rank, address.value) == (1, 2, 1 << 40)
    assert [list(told) for told in (sizes, strides, box, every)] == [[72, 300], [144], [64, 128], [1, 1]]
    assert modes == [0, 3, 2, 0]
    tensor_map(1 << 40, 300, 64, 32, itemsize=1, box_bytes=64)
    kind, _, _, sizes, strides, box, _, *modes = driver.maps[1]
    assert kind == 0 and [list(told) for told in (sizes, strides, box)] == [[64, 300], [64], [64, 32]]
    assert modes == [0, 2, 2, 0]
    Kernel("kernel", Function(driver), overlap=True)((1,), 32, found, 5)
    map_value, number = driver.launches[0][2]
    assert map_value == bytes(found)[:8] and int.from_bytes(number[:4], "little") == 5
    driver.status = 1
    with pytest.raises(DeviceError, match=r"a matrix \[300, 72\] cannot be mapped: CUDA_ERROR_OF_A_TEST"):
        tensor_map(1 << 41, 300, 72, 128)


@pytest.mark.parametrize("sms", [1, 2, 57, 132])
@pytest.mark.parametrize("tokens", [65, 128, 129, 512, 2048])
@pytest.mark.parametrize("rows", [1, 2048, 4096, 6144, 151936])
def test_no_way_to_cut_a_matmul_has_blocks_without_a_tile(sms, tokens, rows):
    card = replace(CARDS["sm_90a"], sms=sms)
    plans = [plan for _, plan in hopper_matmul_plans(card, tokens, rows, 4096)]
    assert len(plans) == 6 * (4 if sms == 1 else 8)
    assert matmul_plan(card, True, tokens, rows, 4096) in plans
    for plan in plans:
        width, cluster, stages = (dict(plan.defines)[name] for name in ("WIDTH", "CLUSTER", "STAGES"))
        clusters, rest = divmod(*plan.grid, cluster)
        assert not rest and 1 <= clusters <= plan.parts * ceil(tokens / (128 * cluster)) * ceil(rows / width)
        assert plan.grid[0] <= sms and plan.boxes == (128, width // cluster)
        assert stages >= 3 and plan.shared <= card.shared_per_block


@pytest.mark.parametrize(
    ("rows", "inner"), [(6144, 2560), (4096, 4096), (2560, 9728), (1024, 3072), (151936, 1024)]
)
def test_a_matmul_may_be_split_alike_for_any_number_of_tokens(rows, inner):
    card = CARDS["sm_90a"]
    splits = usual_splits(card, rows, inner)
    for tokens in (1, 4, 31, 64, 65, 500, 1024):
        plan = matmul_plan(card, True, tokens, rows, inner, splits)
        assert (plan.kernel, plan.parts) == ("linear_hopper", splits)


def test_a_gated_matmul_has_whole_sums():
    card = CARDS["sm_90a"]
    for tokens in (640, 2048):
        plan = gated_matmul_plan(card, True, tokens, 9728, 2560)
        assert plan is not None and plan.parts == 1 and dict(plan.defines)["GATED"] == 1
        assert plan.boxes == (128, dict(plan.defines)["WIDTH"] // 2)
        assert gated_matmul_plan(card, True, tokens, 9728, 2560, 1) is not None
        assert gated_matmul_plan(card, True, tokens, 9728, 2560, 2) is None
        assert gated_matmul_plan(card, False, tokens, 9728, 2560) is None
        assert gated_matmul_plan(CARDS["sm_80"], True, tokens, 9728, 2560) is None
    assert gated_matmul_plan(card, True, 16, 9728, 2560) is None


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("sequences", [1, 2, 18, 128, 144])
def test_lists_of_several_sequences_fit(card, sequences):
    """A thread block has room for the longest part that it may be given."""
    for block, pages in ((4, 128), (16, 512), (16, 8192), (64, 1 << 16)):
        plan = sparse_plan(card, 16, block, 32, 8, 128, pages, 16, 0, sequences)
        tiles = -(-pages * 16 // 64)
        parts = plan.share or 1
        assert plan.capacity * 16 >= -(-tiles // parts) * 64
        assert plan.grid[1] == plan.parts >= sequences
        if plan.share:
            assert plan.parts == plan.share * sequences
        else:
            assert 1 < sequences <= MOST_SHARING and plan.capacity >= sequences


def test_kernels_that_overlap_divide_a_processors_memory_alike(driver):
    Kernel("kernel", Function(driver), overlap=False)
    assert driver.limits == []
    Kernel("kernel", Function(driver), overlap=True)
    assert driver.limits == [(Function.ptr, 9, 100)]  # as much shared memory as there is


def test_launches_raise_the_limit_of_shared_memory_and_never_lower_it(driver):
    launch = Kernel("kernel", Function(driver), overlap=False)
    for shared in (0, 48 << 10, 64 << 10, 50 << 10, 64 << 10, 70 << 10):
        launch((1, 2), 3, shared=shared)
    assert driver.limits == [(Function.ptr, SHARED_LIMIT, size << 10) for size in (64, 70)]


def test_shared_memory_that_the_driver_refuses_is_an_error_of_ours(driver):
    def refuse(*call):
        raise RefusedError("CUDA_ERROR_INVALID_VALUE")

    driver.driver.funcSetAttribute = refuse
    launch = Kernel("block_attention", Function(driver), overlap=False)
    with pytest.raises(DeviceError, match="block_attention needs 131072 bytes of shared memory, more than"):
        launch((1, 2), 3, shared=128 << 10)


def test_a_launch_that_the_driver_refuses_is_an_error_of_ours(driver):
    driver.status = 701
    with pytest.raises(DeviceError, match="the kernel name could not be launched: CUDA_ERROR_OF_A_TEST"):
        Kernel("name", Function(driver), overlap=True)((1,), 32)


def test_a_kernel_that_the_driver_does_not_load_is_an_error_of_ours(driver, monkeypatch):
    monkeypatch.setattr(losart.kernels_cu, "prebuilt_cubin", lambda *inputs: b"refused")
    with pytest.raises(DeviceError, match="does not load embedding, as compiled for sm_90a: CUDA_ERROR_NO_B"):
        losart.kernels_cu._kernel.__wrapped__(0, "embedding", Precision.of("float32"), ())


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("kv_bits", [8, 16, 32])
def test_a_long_list_of_pages_leaves_room_for_tiles(card, kv_bits):
    for heads, kv_heads, block in ((64, 8, 64), (32, 32, 64), (32, 8, 16), (8, 1, 4)):
        for pages in (0, 640, 8192, 16384, 1 << 16):
            shape = (block, heads, kv_heads, 128, pages, 16, -(-pages // 32))
            plan = sparse_plan(card, kv_bits, *shape)
            assert dict(plan.defines).get("STAGES", 2) >= 2
            assert plan.shared <= card.shared_per_block - SHARED_ALIGNMENT
            tile = 64 if kv_bits < 32 else 32
            tiles = -(-pages * 16 // tile)
            assert plan.capacity * 16 >= -(-tiles // plan.parts) * tile and plan.grid[1] == plan.parts
    with pytest.raises(DeviceError, match="too long for this GPU's shared memory"):
        sparse_plan(card, kv_bits, 16, 32, 8, 128, 1 << 24, 16, 1 << 19)


def test_each_device_gets_its_own_kernel_once(driver, monkeypatch):
    def cached_cubin(source, name, options, architecture):
        return f"{name} {options[-1]} {architecture}".encode()

    monkeypatch.setattr(losart.kernels_cu, "cached_cubin", cached_cubin)
    monkeypatch.setattr(losart.kernels_cu, "prebuilt_cubin", lambda *inputs: None)
    losart.kernels_cu._kernel.cache_clear()
    try:
        first = kernel("linear", Precision.of("bfloat16"), (("N", 2),))
        assert kernel("linear", Precision.of("bfloat16"), (("N", 2),)) is first
        driver.device = 1
        second = kernel("linear", Precision.of("bfloat16"), (("N", 2),))
        assert second is not first
        driver.device = 0
        assert kernel("linear", Precision.of("bfloat16"), (("N", 2),)) is first
    finally:
        losart.kernels_cu._kernel.cache_clear()
    assert driver.loaded == [b"linear.cu -DN=2 sm_90a", b"linear.cu -DN=2 sm_86"]
