"""CUDA sources of losart's kernels, and the one place that compiles them and hands them out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from losart.config.precision import DTYPES, FORMATS, KV_FORMATS, Precision
from losart.errors import DeviceError
from losart.kernels_cu.compiler import architecture_of, cached_cubin
from losart.kernels_cu.constants import define_lines
from losart.kernels_cu.launch import OVERLAP_CAPABILITY, OVERLAP_DRIVER, Kernel
from losart.kernels_cu.prebuilt import prebuilt_cubin
from losart.kernels_cu.views import layout_checks

Defines = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class KernelFile:
    """A .cu file, which is named like its kernel.

    Attributes
    ----------
    folder : str
    headers : tuple of str
        Beside `COMMON`, in order.
    spills : bool
        Whether registers may spill to local memory.
    """

    folder: str
    headers: tuple[str, ...] = ()
    spills: bool = False

    @property
    def reads_cache(self) -> bool:
        """Whether it depends on the format of keys and values."""
        return "cache/layout.cuh" in self.headers

    @property
    def sixteen_bit(self) -> bool:
        """Whether what it multiplies must be held in a format of 16 bits: on tensor cores."""
        return "common/tensor.cuh" in self.headers

    def precisions(self, dtypes: Collection[str] = DTYPES) -> list[Precision]:
        """Those that it may be compiled for with these formats of activations; each makes another kernel."""
        kvs = ("auto", *KV_FORMATS) if self.reads_cache else ("auto",)
        fitting = (name for name in dtypes if not self.sixteen_bit or FORMATS[name].bits == 16)
        return [Precision.of(dtype, kv) for dtype in fitting for kv in kvs]

    def compiled(self, precision: Precision) -> Precision:
        """The one of `precisions` by which it is compiled for a model's."""
        kv = precision.kv if self.reads_cache else precision.activations
        return replace(precision, kv=kv, float8_activations=False)


VIEWS = "common/views.cuh"
COMMON = (
    "common/types.cuh",
    "common/math.cuh",
    VIEWS,
    "common/sequences.cuh",
    "common/overlap.cuh",
    "common/reduce.cuh",
)
PLANES = ("matmul/planes.cuh",)
TENSOR_MATMUL = ("matmul/operands.cuh", "common/tensor.cuh")
SWIZZLED_MATMUL = (*TENSOR_MATMUL, "matmul/swizzle.cuh")
TILES = (*SWIZZLED_MATMUL, "matmul/tiles.cuh")
TENSOR_MAPS = ("common/hopper.cuh", "common/tensor_map.cuh")
STORE_SUMS = "matmul/store_sums.cuh"
FLOAT8 = "common/float8.cuh"
QUANTIZED = (*TENSOR_MATMUL, "common/codes.cuh", "matmul/quantized.cuh")
QUANTIZED_PANELS = (*QUANTIZED, "matmul/quantized_panels.cuh")
PAGES = ("cache/pages.cuh",)
CACHE = (*PAGES, FLOAT8, "cache/layout.cuh")
TENSOR = ("common/tensor.cuh", "common/codes.cuh", "cache/codes.cuh")
PLAIN_ATTENTION = (*CACHE, "attention/rows.cuh", "attention/plain.cuh")
FRAGMENTS = (*TENSOR, "attention/rows.cuh", "attention/fragments.cuh")
TENSOR_ATTENTION = (*CACHE, "cache/operands.cuh", *FRAGMENTS, "attention/tensor.cuh")
HOPPER = ("common/hopper.cuh", "attention/hopper_stages.cuh", "attention/hopper.cuh")
HOPPER_ATTENTION = (*CACHE, "attention/hopper_operands.cuh", *FRAGMENTS, *HOPPER)
ROUTING = ("experts/routing.cuh",)
EXPERTS = (*ROUTING, "experts/gated.cuh")
TOP_PAGES = (*PAGES, "selection/choose_top.cuh")
FILES = {
    "embedding": KernelFile("matmul"),
    "linear": KernelFile("matmul"),
    "linear_tensor": KernelFile("matmul", SWIZZLED_MATMUL),
    "linear_tiles": KernelFile("matmul", TILES),
    "linear_hopper": KernelFile("matmul", (*TENSOR_MATMUL, *TENSOR_MAPS, STORE_SUMS)),
    "linear_quantized": KernelFile("matmul", QUANTIZED_PANELS),
    "linear_quantized_hopper": KernelFile("matmul", (*QUANTIZED, "common/hopper.cuh")),
    "linear_float8_hopper": KernelFile("matmul", (*QUANTIZED, *TENSOR_MAPS, STORE_SUMS)),
    "quantize_tokens_hopper": KernelFile("matmul", (*TENSOR_MATMUL, FLOAT8)),
    "embedding_quantized": KernelFile("matmul", QUANTIZED),
    "pack_quantized": KernelFile("matmul", QUANTIZED),
    "dequantize": KernelFile("matmul", QUANTIZED),
    "quantize": KernelFile("matmul", (FLOAT8,)),
    "silu_gate": KernelFile("matmul", PLANES),
    "route": KernelFile("experts", PLANES),
    "expert_lists": KernelFile("experts", ROUTING),
    "expert_rows": KernelFile("experts", ROUTING),
    "experts_linear": KernelFile("experts", EXPERTS),
    "experts_tensor": KernelFile("experts", (*SWIZZLED_MATMUL, *EXPERTS)),
    "experts_tiles": KernelFile("experts", (*TILES, *EXPERTS)),
    "experts_quantized": KernelFile("experts", (*QUANTIZED_PANELS, *ROUTING)),
    "experts_hopper": KernelFile("experts", (*TENSOR_MATMUL, *TENSOR_MAPS, *EXPERTS)),
    "add_rms_norm": KernelFile("norm", PLANES),
    "rotations": KernelFile("norm"),
    "split_heads": KernelFile("norm", PLANES),
    "kv_quantize": KernelFile("cache", CACHE),
    "cache_write": KernelFile("cache", CACHE),
    "prefix_attention": KernelFile("attention", PLAIN_ATTENTION, spills=True),
    "prefix_attention_tensor": KernelFile("attention", TENSOR_ATTENTION),
    "prefix_attention_hopper": KernelFile("attention", (*HOPPER_ATTENTION, "attention/hopper_codes.cuh")),
    "sparse_attention": KernelFile("attention", (*PLAIN_ATTENTION, "attention/page_list.cuh"), spills=True),
    "sparse_attention_tensor": KernelFile("attention", (*TENSOR_ATTENTION, "attention/page_list.cuh")),
    "causal_attention": KernelFile("attention", PLAIN_ATTENTION, spills=True),
    "causal_attention_tensor": KernelFile("attention", TENSOR_ATTENTION),
    "causal_attention_hopper": KernelFile("attention", HOPPER_ATTENTION),
    "merge_parts": KernelFile("attention", ("attention/parts.cuh",)),
    "block_attention": KernelFile("attention", ("attention/parts.cuh",)),
    "query_change": KernelFile("selection"),
    "page_scores": KernelFile("selection", (*PAGES, "selection/bounds.cuh")),
    "page_scores_tensor": KernelFile(
        "selection",
        (*PAGES, "cache/operands.cuh", "common/tensor.cuh", "common/codes.cuh", "selection/bounds.cuh"),
    ),
    "page_masses": KernelFile("selection", PLAIN_ATTENTION, spills=True),
    "page_masses_tensor": KernelFile("selection", TENSOR_ATTENTION),
    "mark_pages": KernelFile("selection", TOP_PAGES),
    "top_pages": KernelFile("selection", TOP_PAGES),
    "gather_rows": KernelFile("sampling"),
    "logit_slices": KernelFile("sampling", (*PLANES, "sampling/logit_row.cuh")),
    "sample": KernelFile("sampling", ("sampling/logit_row.cuh",)),
}


def source(name: str) -> str:
    """The whole source of a kernel: constants, headers with checks of the views' layout, and its own file."""
    folder, file = Path(__file__).parent, FILES[name]
    texts = [("constants.py", define_lines())]
    for path in (*COMMON, *file.headers, f"{file.folder}/{name}.cu"):
        texts.append((path, (folder / path).read_text("utf-8")))
        if path == VIEWS:
            texts.append(("views.py", layout_checks()))
    return "".join(f'#line 1 "{path}"\n{text}\n' for path, text in texts)


def compile_options(precision: Precision, defines: Defines = ()) -> tuple[str, ...]:
    """The compiler's options for a precision and a kernel's compile-time constants."""
    macros = (
        ("LOSART_WEIGHTS", precision.weights.code),
        ("LOSART_KV", precision.kv.code),
        ("LOSART_ACTIVATIONS", precision.activations.code),
        ("LOSART_KV_OPERANDS", precision.kv_operands.code),
        *defines,
    )
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in macros))


def kernel(name: str, precision: Precision, defines: Defines = ()) -> Kernel:
    """A kernel for the current device: prebuilt, or compiled at first use and cached on disk.

    Parameters
    ----------
    name : str
        Of `FILES`.
    precision : Precision
    defines : tuple of (str, int)
        The kernel's compile-time constants.

    Raises
    ------
    DeviceError
        It is neither prebuilt nor cached, and there is no compiler; or the driver does not load it.
    """
    import cupy

    return _kernel(cupy.cuda.runtime.getDevice(), name, FILES[name].compiled(precision), defines)


def prebuilt_for(capability: tuple[int, int]) -> bool:
    """Whether kernels of these very sources, in some format, are prebuilt for devices of this capability."""
    inputs = (source("embedding"), "embedding.cu")
    options = (compile_options(Precision.of(dtype)) for dtype in DTYPES)
    architecture = architecture_of(capability)
    return any(prebuilt_cubin(*inputs, option, architecture) for option in options)


@cache
def _kernel(device: int, name: str, precision: Precision, defines: Defines) -> Kernel:
    import cupy

    capability = divmod(int(cupy.cuda.Device(device).compute_capability), 10)
    options, architecture = compile_options(precision, defines), architecture_of(capability)
    inputs = (source(name), f"{name}.cu", options, architecture)
    cubin = prebuilt_cubin(*inputs) or cached_cubin(*inputs)
    module = cupy.cuda.function.Module()
    try:
        module.load(cubin)
    except cupy.cuda.driver.CUDADriverError as error:
        raise DeviceError(
            f"the driver does not load {name}, as compiled for {architecture}: {error}"
        ) from error
    overlap = capability >= OVERLAP_CAPABILITY and cupy.cuda.runtime.driverGetVersion() >= OVERLAP_DRIVER
    return Kernel(name, module.get_function(name), overlap)
