"""CUDA sources of losart's kernels, and the one place that compiles them and hands them out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from losart.errors import DeviceError
from losart.kernels_cu.compiler import architecture_of, cached_cubin
from losart.kernels_cu.launch import OVERLAP_CAPABILITY, OVERLAP_DRIVER, Kernel
from losart.kernels_cu.prebuilt import prebuilt_cubin

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
SIXTEEN_BIT = ("bfloat16", "float16")
Defines = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class KernelFile:
    """A .cu file, its kernel's name.

    Attributes
    ----------
    headers : tuple of str
    dtypes : tuple of str
        In which weights, keys and values may be held.
    spills : bool
        Whether registers may spill to local memory.
    """

    headers: tuple[str, ...]
    dtypes: tuple[str, ...] = tuple(DTYPE_CODES)
    spills: bool = False


COMMON = ("common.cuh",)
PRODUCT = (*COMMON, "product.cuh")
CACHE = (*COMMON, "cache.cuh")
ATTENTION = (*CACHE, "attention.cuh")
PARTS = (*COMMON, "parts.cuh")
BOUNDS = (*COMMON, "bounds.cuh")
TOP_PAGES = (*COMMON, "top_pages.cuh")
TENSOR = (*COMMON, "tensor.cuh")
TENSOR_ATTENTION = (*CACHE, "tensor.cuh", "tensor_attention.cuh")
HOPPER_ATTENTION = (*CACHE, "tensor.cuh", "hopper.cuh", "hopper_attention.cuh")
FILES = {
    "embedding": KernelFile(COMMON),
    "add_rms_norm": KernelFile(PRODUCT),
    "linear": KernelFile(COMMON),
    "linear_tensor": KernelFile((*PRODUCT, "tensor.cuh"), SIXTEEN_BIT),
    "linear_tiles": KernelFile(TENSOR, SIXTEEN_BIT),
    "linear_hopper": KernelFile((*TENSOR, "hopper.cuh", "tensor_map.cuh"), SIXTEEN_BIT),
    "split_heads": KernelFile(PRODUCT),
    "silu_gate": KernelFile(PRODUCT),
    "cache_write": KernelFile(CACHE),
    "prefix_attention": KernelFile(ATTENTION, spills=True),
    "prefix_attention_tensor": KernelFile(TENSOR_ATTENTION, SIXTEEN_BIT),
    "prefix_attention_hopper": KernelFile(HOPPER_ATTENTION, SIXTEEN_BIT),
    "sparse_attention": KernelFile((*ATTENTION, "page_list.cuh"), spills=True),
    "sparse_attention_tensor": KernelFile((*TENSOR_ATTENTION, "page_list.cuh"), SIXTEEN_BIT),
    "merge_parts": KernelFile(PARTS),
    "block_attention": KernelFile(PARTS),
    "causal_attention": KernelFile(ATTENTION, spills=True),
    "causal_attention_tensor": KernelFile(TENSOR_ATTENTION, SIXTEEN_BIT),
    "causal_attention_hopper": KernelFile(HOPPER_ATTENTION, SIXTEEN_BIT),
    "query_change": KernelFile(COMMON),
    "copy_tokens": KernelFile(COMMON),
    "page_scores": KernelFile(BOUNDS),
    # On capability 10.0, with 3 tiles of rows 128 wide, 4 bytes.
    "page_scores_tensor": KernelFile((*BOUNDS, "tensor.cuh"), SIXTEEN_BIT, spills=True),
    "page_masses": KernelFile(ATTENTION, spills=True),
    "page_masses_tensor": KernelFile(TENSOR_ATTENTION, SIXTEEN_BIT),
    "mark_pages": KernelFile(TOP_PAGES),
    "top_pages": KernelFile(TOP_PAGES),
    "logit_slices": KernelFile((*PRODUCT, "logit_row.cuh")),
    "sample": KernelFile((*COMMON, "logit_row.cuh")),
}


def source(file: str) -> str:
    """The whole source of one file, its headers included."""
    folder = Path(__file__).parent
    parts = (*FILES[file].headers, f"{file}.cu")
    return "".join(f'#line 1 "{part}"\n{(folder / part).read_text("utf-8")}\n' for part in parts)


def compile_options(dtype: str, defines: Defines = ()) -> tuple[str, ...]:
    """The compiler's options for weights, keys and values held in `dtype`."""
    macros = (("LOSART_DTYPE", DTYPE_CODES[dtype]), *defines)
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in macros))


def kernel(name: str, dtype: str, defines: Defines = ()) -> Kernel:
    """A kernel for the current device: prebuilt, or compiled at first use and cached on disk.

    Parameters
    ----------
    name : str
    dtype : {"float32", "bfloat16", "float16"}
        In which weights, keys and values are held.
    defines : tuple of (str, int)
        The file's compile-time constants.

    Raises
    ------
    DeviceError
        It is neither prebuilt nor cached, and there is no compiler; or the driver does not load it.
    """
    import cupy

    return _kernel(cupy.cuda.runtime.getDevice(), name, dtype, defines)


def prebuilt_for(capability: tuple[int, int]) -> bool:
    """Whether kernels of these very sources, in some dtype, are prebuilt for devices of this capability."""
    inputs = (source("embedding"), "embedding.cu")
    architecture = architecture_of(capability)
    return any(prebuilt_cubin(*inputs, compile_options(dtype), architecture) for dtype in DTYPE_CODES)


@cache
def _kernel(device: int, name: str, dtype: str, defines: Defines) -> Kernel:
    import cupy

    capability = divmod(int(cupy.cuda.Device(device).compute_capability), 10)
    inputs = (source(name), f"{name}.cu", compile_options(dtype, defines), architecture_of(capability))
    cubin = prebuilt_cubin(*inputs) or cached_cubin(*inputs)
    module = cupy.cuda.function.Module()
    try:
        module.load(cubin)
    except cupy.cuda.driver.CUDADriverError as error:
        raise DeviceError(f"the driver does not load {name}, as compiled for {inputs[3]}: {error}") from error
    overlap = capability >= OVERLAP_CAPABILITY and cupy.cuda.runtime.driverGetVersion() >= OVERLAP_DRIVER
    return Kernel(name, module.get_function(name), overlap)
