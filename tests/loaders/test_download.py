from __future__ import annotations

import hashlib
import http.server
import json
import threading

import pytest

from losart.errors import CheckpointError
from losart.loaders.download import SIMPLE_JSON, download, indexed_url

CONTENT = bytes(range(256)) * 9000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/simple/thing/":
                assert self.headers["Accept"] == SIMPLE_JSON
                files = [{"filename": "thing-1.whl", "url": "../../files/whole"}]
                body = json.dumps({"files": files}).encode()
            elif self.path == "/simple/page/":
                body = b"<html>"
            elif self.path == "/simple/other/":
                body = b'{"files": 3}'
            elif self.path.startswith("/files/"):
                body = {
                    "whole": CONTENT,
                    "changed": CONTENT[:-1] + b"x",
                    "short": CONTENT[:-1],
                    "long": CONTENT + b"more",
                    "cut": CONTENT,
                }[self.path.rpartition("/")[2]]
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path.endswith("cut") else body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_file_of_an_index_is_downloaded(server, tmp_path):
    url, told = indexed_url(f"{server}/simple/", "thing", "thing-1.whl"), []
    assert url == f"{server}/files/whole"
    download(url, tmp_path / "kept", SHA256, len(CONTENT), lambda *numbers: told.append(numbers))
    assert (tmp_path / "kept").read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT) >> 20, len(CONTENT) >> 20)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("changed", "SHA-256"), ("short", "bytes"), ("long", "more than"), ("cut", ""), ("absent", "404")],
)
def test_another_file_is_refused(server, tmp_path, name, said):
    url = f"{server}/files/{name}" if name != "absent" else f"{server}/absent"
    with pytest.raises(CheckpointError, match=f"{url}: .*{said}"):
        download(url, tmp_path / "kept", SHA256, len(CONTENT))
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays_where_another_comes(server, tmp_path):
    (tmp_path / "kept").write_bytes(b"before")
    with pytest.raises(CheckpointError):
        download(f"{server}/files/changed", tmp_path / "kept", SHA256, len(CONTENT))
    assert (tmp_path / "kept").read_bytes() == b"before"


def test_an_interrupt_leaves_nothing(server, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(f"{server}/files/whole", tmp_path / "kept", SHA256, len(CONTENT), interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("project", "said"),
    [("thing", "has no thing-2.whl"), ("page", "not an index"), ("other", "not an index"), ("none", "404")],
)
def test_what_no_index_has(server, project, said):
    with pytest.raises(CheckpointError, match=f"/simple/{project}/: .*{said}"):
        indexed_url(f"{server}/simple", project, f"{project}-2.whl")


def test_nobody_answers(tmp_path):
    with pytest.raises(CheckpointError, match=r"http://127\.0\.0\.1:1/"):
        indexed_url("http://127.0.0.1:1", "thing", "thing-1.whl")
    with pytest.raises(CheckpointError, match=r"http://127\.0\.0\.1:1/"):
        download("http://127.0.0.1:1/x", tmp_path / "kept", SHA256, 1)
    with pytest.raises(CheckpointError, match="unknown url type"):
        download("x", tmp_path / "kept", SHA256, 1)
