"""The CUDA backend against the memory's floor and torch: dense prefix attention, and a whole pass.

    python benchmarks/cuda_pass.py --json FILE

"Floor" is the bytes that must be read over the copy bandwidth measured in the same run (bytes read
plus bytes written). Random weights of SDAR-8B's sizes, bfloat16, batch 1. Keys and values are
noise: dense attention's time does not depend on them. Torch's row is its best way to this
attention: flash, with the query heads of a kv head laid out as rows. Times are medians of graph
replays, in microseconds, over layers whose keys and values exceed the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from environment import commit, gpu_name

from losart.attention import make_policy
from losart.attention.base import PassKind
from losart.backends.base import PassInputs
from losart.backends.cuda import CudaBackend
from losart.config import ModelConfig
from losart.options import AttentionConfig, generation_config
from losart.transformer import Transformer

SIZES: dict[str, dict[str, int]] = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_layers": 28, "num_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_layers": 36, "num_heads": 32},
}
copy_kernel = cupy.RawKernel(
    """
    extern "C" __global__ void copy(const uint4 *a, uint4 *b, long long count)
    {
        long long step = (long long)gridDim.x * blockDim.x;
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        for (; i + 3 * step < count; i += 4 * step) {
            uint4 w = a[i], x = a[i + step], y = a[i + 2 * step], z = a[i + 3 * step];
            b[i] = w, b[i + step] = x, b[i + 2 * step] = y, b[i + 3 * step] = z;
        }
        for (; i < count; i += step) b[i] = a[i];
    }
    """,
    "copy",
)
noise = cupy.ElementwiseKernel(
    "float32 scale",
    "uint16 bits",
    """
    unsigned x = (unsigned)i * 2654435761u;
    x ^= x >> 15; x *= 2246822519u; x ^= x >> 13; x *= 3266489917u; x ^= x >> 16;
    float value = ((int)x * 4.6566e-10f) * scale;
    bits = (unsigned short)(__float_as_uint(value) >> 16);
    """,
    "losart_noise",
)


class NoiseBackend(CudaBackend):
    """A CUDA backend whose weights are noise made on the device."""

    def upload(self, *shapes: Any) -> Any:
        with self.stream:
            held = cupy.empty((sum(rows for rows, _ in shapes), shapes[0][1]), np.uint16)
            noise(np.float32(1.7 / shapes[0][1] ** 0.5), held)
        return held

    def upload_vector(self, *tensors: Any) -> Any:
        with self.stream:
            return cupy.ones(sum(shape[0] for shape in tensors), np.float32)


class Shapes(dict):
    """Canonical tensor names to shapes, in place of a checkpoint's tensors."""

    def __init__(self, c: ModelConfig) -> None:
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        layer = {
            **dict.fromkeys(("input_norm", "post_norm"), (c.hidden_size,)),
            **dict.fromkeys(("q_norm", "k_norm"), (c.head_dim,)),
            "q": (q, c.hidden_size),
            "k": (kv, c.hidden_size),
            "v": (kv, c.hidden_size),
            "o": (c.hidden_size, q),
            "gate": (c.intermediate_size, c.hidden_size),
            "up": (c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
        }
        super().__init__(
            {f"layers.{i}.{name}": shape for i in range(c.num_layers) for name, shape in layer.items()},
            embed=(c.vocab_size, c.hidden_size),
            head=(c.vocab_size, c.hidden_size),
            final_norm=(c.hidden_size,),
        )


def model_config(size: str, **changes: Any) -> ModelConfig:
    """SDAR's sizes."""
    fixed = {"model_type": "sdar", "vocab_size": 151936, "num_kv_heads": 8, "head_dim": 128}
    options = {**fixed, "max_positions": 262144, "mask_token_id": 151669, "dtype": "bfloat16"}
    return ModelConfig(**{**options, **SIZES[size], **changes})


def graph_microseconds(stream: Any, launch: Callable[[], object], calls: int, repeats: int = 15) -> float:
    """Median microseconds of one call, from replays of a graph of `calls` of them."""
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        launch()
        stream.synchronize()
        stream.begin_capture()
        kept = [launch() for _ in range(calls)]
        graph = stream.end_capture()
        times = []
        for _ in range(repeats):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3 / calls)
        del kept
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second by the faster of two large copies: a kernel's, the driver's."""
    size = 4 << 30
    a, b = (cupy.ones(size // 4, np.float32) for _ in range(2))
    stream = cupy.cuda.Stream(non_blocking=True)
    processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    runtime = cupy.cuda.runtime

    def by_kernel() -> None:
        copy_kernel((16 * processors,), (512,), (a, b, np.int64(size // 16)))

    def by_driver() -> None:
        runtime.memcpyAsync(b.data.ptr, a.data.ptr, size, runtime.memcpyDeviceToDevice, stream.ptr)

    fastest = min(graph_microseconds(stream, copy, 1) for copy in (by_kernel, by_driver))
    return 2 * size / (fastest * 1e-6)


def filled_cache(backend: CudaBackend, prefix: int, room: int = 0) -> Any:
    """A cache full of noise."""
    cache = backend.new_cache(16)
    cache.reserve(prefix + room)
    with backend.stream:
        for kv, _ in cache.table.chunks:
            noise(np.float32(1.0), kv)
    cache.length = prefix
    return cache


def torch_flash(config: ModelConfig, block: int, prefix: int) -> Callable[[], object] | None:
    """Torch's flash attention with a group's query heads as rows, or None without torch."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return None
    group, kv = config.group_size, config.num_kv_heads
    layers = layers_for(config, prefix)
    q = torch.randn(1, kv, block * group, config.head_dim, device="cuda", dtype=torch.bfloat16)
    shape = (1, kv, prefix, config.head_dim)
    k, v = (
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(layers)] for _ in range(2)
    )

    def run() -> float:
        calls = max(8, layers)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for i in range(layers):
                torch.nn.functional.scaled_dot_product_attention(q, k[i], v[i])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(calls):
                    torch.nn.functional.scaled_dot_product_attention(q, k[i % layers], v[i % layers])
        times = []
        for _ in range(15):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / calls)
        return statistics.median(times)

    return run


def layers_for(config: ModelConfig, prefix: int) -> int:
    """So many layers that their keys and values are well past the cache of the device."""
    return max(2, -(-400_000_000 // (4 * prefix * config.num_kv_heads * config.head_dim)))


def prefix_attention(bandwidth: float, prefixes: list[int], blocks: list[int]) -> list[dict[str, Any]]:
    """Rows of the table of dense prefix attention."""
    rows = []
    for block in blocks:
        for prefix in prefixes:
            config = model_config("8B")
            layers = layers_for(config, prefix)
            config = model_config("8B", num_layers=layers)
            backend = CudaBackend(config, "bfloat16")
            cache = filled_cache(backend, prefix)
            with backend.stream:
                backend._place(PassInputs(np.zeros(block, np.int64)), cache)
                q = cupy.random.standard_normal((block, config.num_heads, config.head_dim), np.float32)
            layer = iter(range(1 << 30))

            def launch(backend=backend, cache=cache, q=q, layer=layer, layers=layers) -> Any:
                return backend.merge(backend.prefix_attention(q, cache, next(layer) % layers))

            ours = graph_microseconds(backend.stream, launch, max(8, layers))
            floor = 4 * prefix * config.num_kv_heads * config.head_dim / bandwidth * 1e6
            row = {
                "block": block,
                "prefix": prefix,
                "floor": floor,
                "losart": ours,
                "losart/floor": ours / floor,
            }
            del cache, backend, launch
            cupy.get_default_memory_pool().free_all_blocks()
            rival = torch_flash(config, block, prefix)
            if rival is not None:
                row["torch"] = rival()
                row["torch/losart"] = row["torch"] / ours
            rows.append(row)
            print({key: round(value, 2) for key, value in row.items()}, flush=True)
    return rows


def whole_pass(bandwidth: float, size: str, prefixes: list[int], block: int = 16) -> list[dict[str, Any]]:
    """Rows of the table of whole denoising passes, host and graph launch included."""
    config = model_config(size)
    backend = NoiseBackend(config, "bfloat16")
    transformer = Transformer(config, Shapes(config), backend)
    generation = generation_config(config, {"block_length": block})
    weights = sum(int(np.prod(s)) for name, s in Shapes(config).items() if name != "embed") * 2
    rows = []
    for prefix in prefixes:
        cache = filled_cache(backend, prefix, block)
        policy = make_policy(AttentionConfig(), config, block)
        policy.begin_pass(PassKind.LATER, prefix)
        inputs = PassInputs(np.arange(block), np.arange(block), np.zeros(block))
        times = []
        for _ in range(20):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(backend.stream)
            transformer.denoise(inputs, cache, policy, generation)
            end.record(backend.stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3)
        ours = statistics.median(times[5:])
        kv = 4 * prefix * config.num_kv_heads * config.head_dim * config.num_layers
        floor = (weights + kv) / bandwidth * 1e6
        row = {"prefix": prefix, "floor": floor, "losart": ours, "losart/floor": ours / floor}
        rows.append({"size": size, "block": block, **row})
        print(size, {key: round(value, 2) for key, value in row.items()}, flush=True)
        del cache
        cupy.get_default_memory_pool().free_all_blocks()
    return rows


def products(bandwidth: float, size: str, block: int = 16) -> list[dict[str, Any]]:
    """Rows of the table of a pass's matrix products."""
    config = model_config(size)
    backend = NoiseBackend(config, "bfloat16")
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "qkv": (q + 2 * kv, config.hidden_size),
        "o": (config.hidden_size, q),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (config.vocab_size, config.hidden_size),
    }
    rows = []
    for name, shape in shapes.items():
        copies = max(1, -(-400_000_000 // (2 * shape[0] * shape[1])))
        matrices = [backend.upload(shape) for _ in range(copies)]
        with backend.stream:
            x = cupy.empty((block, shape[1]), np.uint16)
            noise(np.float32(1.0), x)
        turn = iter(range(1 << 30))

        def launch(matrices=matrices, x=x, turn=turn) -> Any:
            return backend.linear(x, matrices[next(turn) % len(matrices)])

        ours = graph_microseconds(backend.stream, launch, 3 * copies)
        floor = 2 * shape[0] * shape[1] / bandwidth * 1e6
        rows.append({"product": name, "floor": floor, "losart": ours, "losart/floor": ours / floor})
        print(size, block, name, {k: round(v, 2) for k, v in rows[-1].items() if k != "product"}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="fewer lengths and sizes")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{gpu_name()}, copy {bandwidth / 1e12:.2f} TB/s, commit {commit()}", flush=True)
    quick = args.quick
    figures = {
        "device": gpu_name(),
        "commit": commit(),
        "copy bytes per second": bandwidth,
        "products": products(bandwidth, "8B"),
        "prefix attention": prefix_attention(
            bandwidth,
            [16384, 65536] if quick else [4096, 8192, 16384, 32768, 65536, 131072],
            [16] if quick else [4, 16, 32],
        ),
        "pass": [
            row
            for size in (["8B"] if quick else ["1.7B", "8B"])
            for row in whole_pass(bandwidth, size, [8192, 65536])
        ],
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
