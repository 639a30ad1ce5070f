from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from losart.errors import CheckpointError
from losart.loaders.hub import checkpoint_directory

huggingface_hub = pytest.importorskip("huggingface_hub")

OPEN = """
import sys
from losart.errors import CheckpointError
from losart.loaders import open_checkpoint
try:
    checkpoint = open_checkpoint(sys.argv[1])
    print(checkpoint.path, checkpoint.config.num_layers, checkpoint.tensors["embed"].array().shape)
except CheckpointError as error:
    print("error:", error)
"""


def open_offline(model: str, cache: Path) -> str:
    """What a fresh process prints, since the hub's library reads its environment once."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OPEN, model]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, cwd="/"
    ).stdout


def test_a_cached_model_opens_offline(make_checkpoint, tmp_path):
    cache, commit = tmp_path / "cache", "0" * 40
    model = cache / "models--some-org--some.model"
    snapshot = model / "snapshots" / commit
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(make_checkpoint(shards=2).iterdir())):
        blob = model / "blobs" / f"{i:064x}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)

    assert open_offline("some-org/some.model", cache) == f"{snapshot} 1 (320, 32)\n"


def test_a_model_that_is_not_cached(tmp_path):
    output = open_offline("some-org/some-model", tmp_path)
    assert output.startswith("error: some-org/some-model: no such directory, and it cannot be fetched")


def test_a_directory_is_taken_as_it_is(tmp_path):
    assert checkpoint_directory(str(tmp_path)) == tmp_path
    assert checkpoint_directory(tmp_path) == tmp_path


def test_a_file_is_no_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a checkpoint is a directory"):
        checkpoint_directory(file)


@pytest.mark.parametrize(
    "model",
    [
        "",
        "model",
        "/no/such/directory",
        "./no/such",
        "../no",
        "no/such/directory",
        "org/",
        "/org",
        "org/a b",
        "org/a..b",
        "org/a--b",
        "org/ü",
        "org/name\n",
        "x" * 5000,
        Path("org/name"),
    ],
)
def test_names_that_cannot_be_hub_ids(monkeypatch, tmp_path, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint_directory(model)


def test_without_network_the_cache_serves(monkeypatch, tmp_path):
    calls = []

    def download(model, *, local_files_only=False, **options):
        calls.append(local_files_only)
        if not local_files_only:
            raise ConnectionError("no network")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint_directory("org/name") == tmp_path
    assert calls == [False, True]


def test_the_error_tells_why_the_hub_failed(monkeypatch):
    def download(model, *, local_files_only=False, **options):
        raise ConnectionError("nothing cached" if local_files_only else "no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"org/name: no such directory, .*no network"):
        checkpoint_directory("org/name")


def test_only_the_files_of_a_checkpoint_are_fetched(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    fetched = []

    def download(model, *, allow_patterns, **options):
        files = [
            "config.json",
            "tokenizer.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "chat_template.jinja",
            "modeling_sdar.py",
            "pytorch_model.bin",
            "README.md",
        ]
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint_directory("org/name")
    assert fetched == [
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "chat_template.jinja",
    ]
