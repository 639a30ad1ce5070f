"""Every kernel compiles for all devices that it is meant for, within their limits; needs no device."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import losart.kernels_cu
from losart.backends.cuda.variants import CARDS, variants
from losart.config.precision import FORMATS, Precision
from losart.errors import DeviceError
from losart.kernels_cu import COMMON, FILES, Defines, KernelFile, compile_options, constants, source, views
from losart.kernels_cu.compiler import compile_cubin, is_known, nvrtc_version

JOBS = [
    (name, architecture)
    for name, file in FILES.items()
    for architecture, card in CARDS.items()
    if any(variants(name, card, precision) for precision in file.precisions())
]


# Elsewhere float16 differs from bfloat16, and fp8 keys and values from int8 ones, by some instructions that
# all have: they take half of the time. On the first in one variant of each kernel.
EVERY_PRECISION = ("sm_80", "sm_90a")
# The same instructions as another, which has all variants: one of a kernel and precision will do. sm_100 has
# the kernels of sm_80, in more shared memory.
ONE_VARIANT = {
    "sm_100": "sm_80",
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
    "sm_121": "sm_120",
}


@pytest.fixture(scope="module")
def compiler() -> None:
    """Skips where there is no compiler."""
    try:
        nvrtc_version()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def found(compiler: None, request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], list[Future]]]:
    """What is wrong with the chosen jobs' compilations, which run on all cores at once."""
    prefix = test_kernel_compiles.__name__ + "["
    chosen = [item.callspec.params["job"] for item in request.session.items if item.name.startswith(prefix)]
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    yield {
        (name, architecture): [
            threads.submit(complaints, name, file, source(name), architecture, precision, defines, shared)
            for file in [FILES[name]]
            for precision in file.precisions()
            if architecture in EVERY_PRECISION or _is_usual(precision)
            for defines, shared in _compiled(name, architecture, precision)
        ]
        for name, architecture in chosen
        if is_known(architecture)
    }
    threads.shutdown(cancel_futures=True)


def _compiled(name: str, architecture: str, precision: Precision) -> list[tuple[Defines, int]]:
    found = list(variants(name, CARDS[architecture], precision).items())
    one = architecture in ONE_VARIANT or (architecture == EVERY_PRECISION[0] and not _is_usual(precision))
    return found[-1:] if one else found


def _is_usual(precision: Precision) -> bool:
    return precision.activations.name != "float16" and precision.kv.name != "fp8"


def complaints(
    name: str,
    file: KernelFile,
    source: str,
    architecture: str,
    precision: Precision,
    defines: Defines,
    shared: int,
) -> list[str]:
    """What is wrong with one compilation of a kernel."""
    options = (*compile_options(precision, defines), "--ptxas-options=-v")
    case = f"{name}, {precision.activations.name}, kv {precision.kv.name}, {dict(defines)}, {architecture}"
    try:
        _, log = compile_cubin(source, f"{name}.cu", options, architecture)
    except DeviceError as error:
        return [f"{case}: {error}"]
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", log)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.findall(r"Used \d+ registers(?:.*?(\d+) bytes smem)?", log)
    wrong = []
    if kernels != [(name, architecture)] or not frames or len(used) != 1:
        wrong.append("the log is not that of this kernel")
    if not file.spills and any(int(size) for frame in frames for size in frame):
        wrong.append("it spills to local memory")
    fixed = sum(int(size or 0) for size in used)
    if fixed + shared > CARDS[architecture].shared_per_block:
        wrong.append(f"{fixed} + {shared} bytes of shared memory are too many")
    if "warning" in log or "Performance Loss" in log:
        wrong.append("the compiler warns")
    return [f"{case}: {problem}:\n{log}" for problem in wrong]


def test_table_has_every_source_and_names_what_to_compile():
    folder = Path(losart.kernels_cu.__file__).parent
    files = {f"{file.folder}/{name}.cu" for name, file in FILES.items()}
    assert files == {path.relative_to(folder).as_posix() for path in folder.rglob("*.cu")}
    headers = {*COMMON, *(header for file in FILES.values() for header in file.headers)}
    assert headers == {path.relative_to(folder).as_posix() for path in folder.rglob("*.cuh")}
    assert {name for name, _ in JOBS} == set(FILES)
    hopper_only = {name for name in FILES if all(a == "sm_90a" for n, a in JOBS if n == name)}
    assert hopper_only == {name for name in FILES if name.endswith("_hopper")} and len(hopper_only) == 7


@pytest.mark.parametrize("name", FILES)
def test_headers_are_used_and_come_from_known_folders(name):
    file = FILES[name]
    assert len({*COMMON, *file.headers}) == len(COMMON) + len(file.headers)
    # selection/ uses headers of attention/ too, and whatever reads the result of a matmul those of matmul/.
    shared = {"common", "matmul", "cache", "attention", file.folder}
    assert {header.split("/")[0] for header in file.headers} <= shared
    parts = re.findall(r'^#line 1 "(.*)"$', source(name), re.MULTILINE)
    at = parts.index("common/views.cuh")
    assert parts.pop(at + 1) == "views.py" and parts.pop(0) == "constants.py"
    assert parts == [*COMMON, *file.headers, f"{file.folder}/{name}.cu"]


def test_tensor_kernels_take_formats_of_16_bits_only():
    for name, file in FILES.items():
        parts = ("tensor", "hopper", "tiles", "quantized", "dequantize")
        assert file.sixteen_bit == any(part in name for part in parts)
        dtypes = {precision.activations.name for precision in file.precisions()}
        assert dtypes == ({"bfloat16", "float16"} if file.sixteen_bit else set(FORMATS))


def test_only_kernels_that_read_the_cache_are_compiled_for_each_format_of_keys_and_values():
    folder, eight = Path(losart.kernels_cu.__file__).parent, Precision.of("bfloat16", "int8")
    for name, file in FILES.items():
        found = [precision.kv.name for precision in file.precisions(["bfloat16"])]
        own = (folder / file.folder / f"{name}.cu").read_text()
        assert found == (["bfloat16", "int8", "fp8"] if file.reads_cache else ["bfloat16"])
        assert file.reads_cache or not re.search("KVValue|CACHED_KEYS", own)
        assert file.compiled(eight) in file.precisions()


def test_numbers_of_python_are_macros_of_every_source():
    lines = constants.define_lines().splitlines()
    assert "#define PANEL_ROWS 128" in lines and "#define BFLOAT16 1" in lines
    text = {name: source(name) for name in FILES}
    everything = "".join(text.values())
    for line in lines:
        _, macro, value = line.split()
        assert value.isdecimal() and all(line in one for one in text.values())
        # Once defined, it is not defined again, and it is of use.
        assert len(re.findall(rf"#define {macro}\b", everything)) == len(FILES)
        assert len(re.findall(rf"\b{macro}\b", everything)) > len(FILES), macro


def test_precision_reaches_the_compiler():
    bfloat16, float16, float32 = (FORMATS[name] for name in ("bfloat16", "float16", "float32"))
    options = compile_options(Precision(bfloat16, float16, float32), (("N", 3),))
    formats = ("-DLOSART_WEIGHTS=1", "-DLOSART_KV=2", "-DLOSART_ACTIVATIONS=0", "-DLOSART_KV_OPERANDS=2")
    assert options[1:] == (*formats, "-DN=3")
    assert compile_options(Precision.of("bfloat16", "int8"))[2:] == (
        *("-DLOSART_KV=3", "-DLOSART_ACTIVATIONS=1", "-DLOSART_KV_OPERANDS=1"),
    )


@pytest.mark.parametrize("job", JOBS, ids="-".join)
def test_kernel_compiles(found, job):
    if job not in found:
        pytest.skip("NVRTC {}.{} does not know {}".format(*nvrtc_version(), job[1]))
    wrong = [complaint for future in found[job] for complaint in future.result()]
    assert not wrong, "\n\n".join(wrong)


def test_the_compiler_knows_what_it_compiles_for(compiler):
    assert is_known("sm_80") and is_known("sm_90a") and not is_known("sm_999")
    with pytest.raises(DeviceError, match="sm_999"):
        compile_cubin(SOUND, "kernel.cu", (), "sm_999")


SOUND = 'extern "C" __global__ void kernel(float *x) { x[threadIdx.x] = 0; }'
SPILLING = """extern "C" __global__ void __launch_bounds__(1024) kernel(float *x, int n)
{
    float a[100];
    for (int i = 0; i < 100; i++) a[i] = x[i * n];
    __syncthreads();
    for (int i = 0; i < 100; i++) x[i] = a[i] * a[99 - i];
    for (int i = 0; i < 100; i++) x[i * n] = a[i] + a[99 - i];
}"""
FRAME = """extern "C" __global__ void kernel(float *x)
{
    float a[64] = {};
    for (int i = 0; i < 64; i++) a[(int)x[i] % 64] += 1;
    for (int i = 0; i < 64; i++) x[i] = a[i];
}"""
SHARED = """extern "C" __global__ void kernel(float *x)
{
    __shared__ float a[1024];
    a[threadIdx.x] = x[0];
    __syncthreads();
    x[0] = a[threadIdx.x + 1];
}"""


@pytest.mark.parametrize(
    ("text", "options", "complaint"),
    [
        (SOUND, {}, None),
        (SOUND.replace("kernel", "other"), {}, "not that of this kernel"),
        (SOUND + SOUND.replace("kernel", "other"), {}, "not that of this kernel"),
        (SOUND.replace("{", "{ int n;"), {}, "the compiler warns"),
        (SOUND.replace("0", "nothing"), {}, "cannot compile kernel.cu"),
        (SPILLING, {}, "spills"),
        (SPILLING, {"spills": True}, None),
        (FRAME, {}, "spills"),
        (FRAME, {"spills": True}, None),
        (SHARED, {"shared": 95 * 1024}, None),
        (SHARED, {"shared": 95 * 1024 + 1}, "shared memory"),
    ],
)
def test_check_finds_what_is_wrong(compiler, text, options, complaint):
    options = dict(options)
    shared = options.pop("shared", 0)
    precision = Precision.of("bfloat16")
    wrong = complaints("kernel", KernelFile("", **options), text, "sm_86", precision, (("N", 1),), shared)
    assert not wrong if complaint is None else complaint in "".join(wrong)


@pytest.mark.parametrize(
    ("weights", "kv", "activations"),
    [
        ("bfloat16", "float16", "bfloat16"),
        ("float16", "float32", "float16"),
        ("float32", "bfloat16", "float16"),
    ],
)
def test_formats_of_a_precision_are_independent(compiler, weights, kv, activations):
    precision = Precision(*(FORMATS[name] for name in (weights, kv, activations)))
    for name in ("embedding", "linear", "cache_write", "block_attention", "page_scores", "causal_attention"):
        (defines, *_) = variants(name, CARDS["sm_80"], Precision.of("float32"))
        compile_cubin(source(name), f"{name}.cu", compile_options(precision, defines), "sm_80")


def test_matmuls_on_tensor_cores_need_operands_of_one_format(compiler):
    precision = Precision(FORMATS["bfloat16"], FORMATS["bfloat16"], FORMATS["float16"])
    options = compile_options(precision, (("STAGES", 3),))
    with pytest.raises(DeviceError, match="tensor cores take operands of one format"):
        compile_cubin(source("linear_tiles"), "linear_tiles.cu", options, "sm_80")


@pytest.mark.parametrize("view", views.VIEWS, ids=lambda view: view.__name__)
def test_a_view_that_differs_from_its_declaration_does_not_compile(compiler, monkeypatch, view):
    options = compile_options(Precision.of("float32"))
    first, second, *rest = view._fields_
    for fields in ((second, first, *rest), view._fields_[1:], (*view._fields_, ("extra", ctypes.c_int64))):
        changed = type(view.__name__, (ctypes.Structure,), {"_fields_": fields})
        monkeypatch.setattr(views, "VIEWS", (changed,))
        with pytest.raises(DeviceError, match=r"kernels_cu/views\.py disagrees|has no member"):
            compile_cubin(source("embedding"), "embedding.cu", options, "sm_80")


def test_error_has_the_log(compiler):
    with pytest.raises(DeviceError, match=r'(?s)for sm_80:\nhead.cuh\(2\): error: .*"nothing" is undefined'):
        compile_cubin('#line 2 "head.cuh"\n' + SOUND.replace("0", "nothing"), "kernel.cu", (), "sm_80")
    with pytest.raises(DeviceError, match="invalid value for --gpu-architecture"):
        compile_cubin(SOUND, "kernel.cu", (), "sm_999")
