"""A file from the network, kept only when it is what it should be."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from losart.errors import CheckpointError

PYPI = "https://pypi.org/simple"
SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
MOST_INDEX_BYTES = 16 << 20
PIECE = 1 << 20
SECONDS = 30  # without an answer


def indexed_url(index: str, project: str, filename: str) -> str:
    """Where an index of Python packages (PEP 691) has a project's file.

    Raises
    ------
    CheckpointError
        If the index cannot be reached, is none, or has no such file.
    """
    page = f"{index.rstrip('/')}/{project}/"
    request = urllib.request.Request(page, headers={"Accept": SIMPLE_JSON})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            text = answer.read(MOST_INDEX_BYTES)
        listed = json.loads(text)["files"]
        url = next((one["url"] for one in listed if one["filename"] == filename), None)
    except (OSError, HTTPException) as error:
        raise CheckpointError(f"{page}: {_reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{page}: not an index of packages ({SIMPLE_JSON})") from error
    if not isinstance(url, str):
        raise CheckpointError(f"{page}: has no {filename}")
    return urllib.parse.urljoin(page, url)


def download(
    url: str, file: Path, sha256: str, size: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write a file of known content; nothing is left where it comes to be another.

    Parameters
    ----------
    url : str
    file : Path
        In a directory that exists.
    sha256 : str
        Of the content, in hexadecimal digits.
    size : int
        In bytes.
    progress : callable, optional
        Called with the MiB written and the MiB in all.

    Raises
    ------
    CheckpointError
        If the server cannot be reached, or its file is not the one expected.
    """
    found, written = hashlib.sha256(), 0
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as part:
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:
                while piece := answer.read(PIECE):
                    written += len(piece)
                    if written > size:
                        break
                    found.update(piece)
                    part.write(piece)
                    if progress is not None:
                        progress(written >> 20, size >> 20)
            part.flush()
            if written != size:
                more = "more than " if written > size else f"{written} of "
                raise CheckpointError(f"{url}: {more}{size} bytes; it is not kept")
            if found.hexdigest() != sha256:
                raise CheckpointError(f"{url}: SHA-256 {found.hexdigest()}, not {sha256}; it is not kept")
            os.replace(part.name, file)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{url}: {_reason(error)}") from error
        finally:
            Path(part.name).unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)
    return str(error) or type(error).__name__
