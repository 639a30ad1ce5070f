"""Measured processes: start a probe under some interpreter and read what it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from losart.errors import LosartError

PROBES = Path(__file__).parent / "probes"
# "" is the working directory, from which nothing must be imported: only the probes.
LAUNCH = (
    "import sys; sys.path[:] = filter(None, sys.path); sys.path.append(sys.argv[1]); import {0}; {0}.main()"
)
# No requests to the hub, and no reports of progress.
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
SECONDS = 1800  # after which a process is killed


@dataclass(frozen=True)
class Request:
    """The generation that a process is asked for.

    Attributes
    ----------
    device : {"cpu", "cuda"}
    prompt_tokens, new_tokens, block_length, mask_token_id : int
    confidence_threshold : float
        Of low-confidence dynamic remasking.
    shifted : bool
        Whether a row predicts the token after its own, and the last of a finished block the next one's first.
    """

    device: str
    prompt_tokens: int
    new_tokens: int
    block_length: int
    mask_token_id: int
    confidence_threshold: float = 0.85
    shifted: bool = False


@dataclass(frozen=True)
class Interpreter:
    """A Python that has the packages of a side.

    Attributes
    ----------
    path : path
    isolated : bool
        Whether it ignores PYTHONPATH and the user's site.
    """

    path: Path
    isolated: bool = True

    def report(self, name: str, arguments: Mapping[str, Any], environment: Mapping[str, str] = QUIET) -> Any:
        """What one of the `probes` prints in its last line, JSON.

        Raises
        ------
        LosartError
            The process failed.
        """
        options = ["-I"] if self.isolated else []
        command = [str(self.path), *options, "-c", LAUNCH.format(name), str(PROBES), json.dumps(arguments)]
        return json.loads(run(command, environment, name).strip().splitlines()[-1])


def probe(
    python: Interpreter,
    name: str,
    checkpoint: Path,
    request: Request,
    environment: Mapping[str, str] | None = None,
    watch: bool = False,
) -> dict[str, Any]:
    """Run one process that generates.

    Parameters
    ----------
    python : Interpreter
    name : {"probe_losart", "probe_transformers"}
    checkpoint : path
        For transformers as `for_transformers` gives it.
    request : Request
    environment : mapping, optional
        Further environment variables.
    watch : bool
        Whether the peak of RssAnon is sampled, which takes time of its own.

    Returns
    -------
    dict
        `tokens`: the new token ids. `weights`, `kv`: bytes of matrices, and of keys and values in the
        end, by the formats that they are held in. `seconds` of the stages python (from the start of the
        process), import, context, load, first token and generate. `bytes` by stage, at its end: the fields of
        /proc/self/status, and `device`: minus the free memory of the device, whichever process uses it.

    Raises
    ------
    LosartError
        The process failed.
    """
    arguments = {"checkpoint": str(checkpoint), "began": time.monotonic(), "watch": watch}
    return python.report(name, arguments | asdict(request), QUIET | dict(environment or {}))


def run(command: Sequence[str], environment: Mapping[str, str], name: str) -> str:
    """A command's standard output. It and all that it started are killed when this is left early.

    Raises
    ------
    LosartError
        With `name` and the last line of standard error.
    """
    # In its own session: all that it starts can be killed with it, and a terminal's Ctrl-C reaches only us.
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, error = process.communicate(timeout=SECONDS)
    except BaseException as caught:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(caught, subprocess.TimeoutExpired):
            raise LosartError(f"{name} had not ended after {SECONDS} s") from None
        raise
    if process.returncode:
        lines = error.strip().splitlines()
        raise LosartError(f"{name}: {lines[-1] if lines else f'ended with {process.returncode}'}")
    return output


def for_transformers(checkpoint: Path, folder: Path) -> Path:
    """A directory that transformers knows: of SDAR the same files, whose weights are named as Qwen3's."""
    keys = json.loads((checkpoint / "config.json").read_text())
    if keys["model_type"] != "sdar":
        return checkpoint
    folder.mkdir()
    keys |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    keys.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(keys))
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    return folder
