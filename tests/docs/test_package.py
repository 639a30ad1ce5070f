"""What `import losart` brings with it, and what an installation puts where."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

import losart
import losart.kernels_cu
import losart.loaders

REPOSITORY = Path(__file__).parents[2]


def run_python(code: str) -> str:
    # Elsewhere: the repository's own folders must not be found by accident.
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light():
    heavy = "cupy torch transformers jinja2 huggingface_hub tokenizers ray pyarrow llguidance"
    code = f"import sys, losart; print(*[name for name in '{heavy}'.split() if name in sys.modules])"
    assert run_python(code) == ""


def test_generation_from_ids_needs_no_jinja2_and_no_hub(tiny_checkpoint):
    code = (
        f"import sys, losart; losart.generate({str(tiny_checkpoint)!r}, [1, 2, 3], max_new_tokens=4); "
        "print(*[name for name in ('jinja2', 'huggingface_hub', 'torch') if name in sys.modules])"
    )
    assert run_python(code) == ""


def test_nothing_but_losart_enters_the_namespace():
    code = (
        "import importlib.util as u, losart.loaders, losart.kernels_cu; "
        "print([u.find_spec(name) for name in ('loaders', 'kernels_cu', 'tests', 'benchmarks')])"
    )
    assert run_python(code) == "[None, None, None, None]"


def test_types_are_shipped():
    assert (Path(losart.__file__).parent / "py.typed").exists()


def test_a_checkpoint_is_shipped_with_its_card():
    folder = Path(losart.__file__).parent / "small_checkpoint"
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    weights = {"model.safetensors", "config.json", "generation_config.json"}
    assert files.keys() == weights | {"tokenizer.json", "tokenizer_config.json", "README.md"}
    assert sum(files.values()) <= 16e6
    assert run_python("import losart; print(losart.load(device='cpu').config.block_length)") == "16"


@pytest.mark.parametrize(
    ("package", "extras"), [("torch", {"parity", "train"}), ("transformers", {"parity"})]
)
def test_torch_is_only_needed_by_extras(package, extras):
    wanted = [line for line in requires("losart") or [] if re.match(rf"{package}\b", line)]
    assert {re.search(r'extra == "(\w+)"', line)[1] for line in wanted} == extras


def test_compiled_modules_are_importable():
    for name in (
        "pool",
        "active_set",
        "kv_index",
        "attention_kernels",
        "layer_kernels",
        "plain_linear",
        "quantized_linear",
    ):
        assert importlib.util.find_spec(f"losart.backends.cpu.{name}") is not None
    for name in ("losart.backends.cuda.pass_inputs", "losart.engine.remasking"):
        assert importlib.util.find_spec(name) is not None


def test_generated_c_is_not_installed():
    folder = Path(losart.__file__).parent
    if (folder.parent / "pyproject.toml").exists():
        pytest.skip("not an installation but the repository, where Cython leaves it")
    assert not list(folder.rglob("*.c"))


# A source tree whose extensions are not built.


@pytest.fixture
def source_tree(tmp_path):
    for name in ("losart", "loaders", "kernels_cu"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("cubins", "*.so"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def import_error(folder: Path, code: str = "import losart") -> str:
    """The last line of what Python says when losart is imported from this folder."""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("Traceback") == 1
    return result.stderr.splitlines()[-1]


# An editable installation finds the packages that lie beside `losart/`, wherever losart itself comes from.
NOT_EDITABLE = "import sys; sys.meta_path = [one for one in sys.meta_path if 'editable' not in str(one)]; "


@pytest.mark.parametrize("before", ["", NOT_EDITABLE])
def test_sources_that_are_not_built_say_how_to_build(source_tree, before):
    message = f"losart is imported from sources that are not built: run `pip install -e .` in {source_tree}"
    assert import_error(source_tree, f"{before}import losart") == f"ImportError: {message}"


def test_a_missing_dependency_is_named_as_python_does(source_tree):
    error = import_error(source_tree, "import sys; sys.modules['numpy'] = None; import losart")
    assert error.startswith("ModuleNotFoundError: import of numpy")


def test_a_missing_module_of_ours_is_named_as_python_does(source_tree):
    (source_tree / "losart/config/rope.py").unlink()
    assert import_error(source_tree).startswith("ModuleNotFoundError: No module named 'losart.config.rope'")


# setup.py without the modules to be compiled, which take minutes.
BUILD = """
import runpy, sys, types
cython = types.ModuleType("Cython.Build")
cython.cythonize = lambda *modules, **options: []
sys.modules |= {"Cython": types.ModuleType("Cython"), "Cython.Build": cython}
sys.argv = ["setup.py", "-q", "build_py", "--build-lib", "built"]
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize("archives", [[], ["sm_80.tar.xz", "sm_90a.tar.xz"]])
def test_prebuilt_kernels_are_installed_where_there_are_any(source_tree, archives):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, source_tree)
    (source_tree / "kernels_cu/cubins").mkdir()
    for archive in archives:
        (source_tree / "kernels_cu/cubins" / archive).write_bytes(b"archive")
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=source_tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    installed = source_tree / "built/losart/kernels_cu"
    assert sorted(path.name for path in installed.glob("cubins/*")) == archives
    assert (installed / "common/types.cuh").exists() and (installed / "prebuilt.py").exists()
