"""Builds the Cython modules; everything else about the package is in pyproject.toml."""

import os
import subprocess
import sys
import tempfile

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODULES = (
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
    "simd.h",
    "simd_body.h",
    "simd.pxd",
    "integer_dots.h",
    "integer_dots_body.h",
    "integer_dots_neon.h",
)

OPENMP_PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


class BuildExtensions(build_ext):
    """Adds OpenMP where the compiler at hand has it."""

    def build_extensions(self):
        compile_args = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-Wno-unused-function"]
        link_args = []
        if self.compiles(OPENMP_PROBE, ["-fopenmp"]):
            compile_args.append("-fopenmp")
            link_args.append("-fopenmp")
        else:
            print("losart: no OpenMP, the CPU kernels will use one thread", file=sys.stderr)
        for extension in self.extensions:
            extension.extra_compile_args += compile_args
            extension.extra_link_args += link_args
        super().build_extensions()

    def compiles(self, source, flags):
        if self.compiler.compiler_type != "unix":
            return False
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "probe.c")
            with open(path, "w") as file:
                file.write(source)
            command = [*self.compiler.compiler, *flags, path, "-o", os.path.join(folder, "probe")]
            return subprocess.run(command, capture_output=True).returncode == 0


def extension(module):
    return Extension(
        module,
        [module.replace(".", "/") + ".pyx"],
        include_dirs=[numpy.get_include(), "losart/backends/cpu"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
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
    cmdclass={"build_ext": BuildExtensions},
)
