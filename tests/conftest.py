"""Fixtures that many tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from released_config import SDAR_1_7B

from losart.backends import cuda_problem
from losart.config.model import ModelConfig
from losart.loaders.model_config import read_model_config
from losart.measure.random_checkpoint import write_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of CUDA are skipped, saying why, where there is none."""
    problem = cuda_problem()
    if problem is not None:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the default random checkpoint (4 layers, float32); not to be written to."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of one small layer into the test's directory; options as `write_checkpoint`'s."""

    def make(name: str = "checkpoint", **options: object) -> Path:
        small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "head_dim": 16}
        return write_checkpoint(tmp_path / name, **small | options)

    return make


@pytest.fixture
def read_config(tmp_path: Path) -> Callable[..., ModelConfig]:
    """Read SDAR-1.7B's configuration with keys changed; `...` deletes one."""

    def read(generation: dict[str, Any] | None = None, tokenizer: Any = None, **changes: Any) -> ModelConfig:
        keys = {key: value for key, value in (SDAR_1_7B | changes).items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_model_config(tmp_path, tokenizer)

    return read
