"""Fixtures that many tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from random_checkpoint import write_checkpoint


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
