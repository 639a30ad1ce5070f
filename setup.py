"""Builds the Cython modules; everything else about the package is in pyproject.toml."""

import os

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

MODULES = (
    "losart.backends.cpu.pool",
    "losart.backends.cpu.active_set",
    "losart.backends.cpu.kv_index",
    "losart.backends.cpu.attention_kernels",
    "losart.backends.cpu.layer_kernels",
    "losart.backends.cpu.plain_linear",
    "losart.backends.cpu.quantized_linear",
    "losart.backends.cuda.pass_inputs",
    "losart.engine.remasking",
)

HEADERS = (
    "pool.h",
    "pool.pxd",
    "simd.h",
    "simd_body.h",
    "simd.pxd",
    "integer_dots.h",
    "integer_dots_body.h",
    "integer_dots_neon.h",
)

COMPILE_ARGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-Wno-unused-function", "-pthread"]


def extension(module):
    return Extension(
        module,
        [module.replace(".", "/") + ".pyx"],
        include_dirs=[numpy.get_include(), "losart/backends/cpu"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=["-pthread"],
        depends=[f"losart/backends/cpu/{name}" for name in HEADERS],
    )


setup(
    packages=[
        *find_packages(include=["losart", "losart.*"]),
        "losart.loaders",
        "losart.loaders.adapters",
        "losart.loaders.families",
        "losart.loaders.gguf",
        "losart.loaders.quantized",
        "losart.kernels_cu",
    ],
    package_dir={"losart.loaders": "loaders", "losart.kernels_cu": "kernels_cu"},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        [extension(module) for module in MODULES],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    ),
)
