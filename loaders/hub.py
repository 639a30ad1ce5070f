"""The directory of a checkpoint or an adapter, downloaded from the Hugging Face hub if need be."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path

from losart.errors import CheckpointError
from losart.loaders import smollm2

# Two names with a slash between them, each by the hub's own rules.
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = [
    "config.json",
    "generation_config.json",
    "losart.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model*.safetensors",
]


def checkpoint_directory(model: str | os.PathLike[str] | None) -> Path:
    """The directory of a checkpoint.

    Parameters
    ----------
    model : str, path or None
        A directory, or else "smollm2", if it was fetched, or a hub id ("org/name"), which is downloaded into
        the hub's cache; None for the small checkpoint that comes with losart.

    Raises
    ------
    CheckpointError
        If there is no such directory, it was not fetched, or the hub has no such model or cannot be reached.
    """
    if model is None:
        return Path(str(package_files("losart") / "small_checkpoint"))
    if model == smollm2.NAME and not os.path.exists(model):
        return smollm2.fetched()
    return directory_of(model, "a checkpoint", _FILES)


def gguf_file(model: str | os.PathLike[str] | None) -> Path | None:
    """The file, where a checkpoint is named by one that ends in ".gguf"."""
    if not isinstance(model, (str, os.PathLike)) or not isinstance(os.fspath(model), str):
        return None
    path = Path(model)
    return path if path.suffix.lower() == ".gguf" and not path.is_dir() else None


def directory_of(path: str | os.PathLike[str], what: str, files: Sequence[str]) -> Path:
    """The directory of something that consists of `files`, which are fetched if `path` is a hub id.

    Raises
    ------
    CheckpointError
        As of `checkpoint_directory`.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise CheckpointError(f"{what} is named by a string or a path, not {path!r}")
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise CheckpointError(f"{path}: {what} is a directory, and this is a file")
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise CheckpointError(f"{path}: no such directory")
    return _fetch(path, files)


def _fetch(hub_id: str, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{hub_id}: no such directory, and fetching it from the hub needs huggingface_hub: {error}"
        ) from error

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id}: no such directory, and no such model on the hub (or no access to it): {error}"
        ) from error
    except Exception as error:  # network errors have no common base class
        reason = error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files), local_files_only=True))
    except Exception:
        raise CheckpointError(
            f"{hub_id}: no such directory, and it cannot be fetched from the hub: {reason}"
        ) from reason
