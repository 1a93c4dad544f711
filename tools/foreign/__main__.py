"""`make foreign`: each software is asked the same questions, and its answers are compared with the kit's."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from lora_llava.system.table import Column, FittingTable
from tools.foreign.environments import (
    HOME,
    LLAMA_CPP,
    LLAVA,
    ROOT,
    T448,
    T457,
    VLLM,
    Environment,
    UnavailableError,
    old_peft,
    python_of,
)
from tools.foreign.work import ROUNDED, Work, prepare

_ASK_SECONDS = 1800
_OLD_PEFT = ("0.10.0", "0.12.0", "0.13.2", "0.14.0")


@dataclass(frozen=True, slots=True)
class Check:
    """One software, one form, and the share of answers that must be the kit's."""

    software: str
    form: str
    environment: Environment | None
    script: str
    arguments: tuple[str, ...]
    goal: float = 1.0
    """Of the answers of a trained run; those of the tiny one are nearly ties, and only their number is shown.

    0: measured only.
    """
    short: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a check gave: `equal` of `asked` answers, and how far the logits are."""

    equal: int = 0
    asked: int = 0
    difference: float | None = None
    """L2 norm of the differences over that of the kit's logits."""
    seconds: float = 0.0
    missing: str = ""
    """Why it was not run; empty if it was."""


def checks(work: Work, llava: Path | None) -> list[Check]:
    """List everything that is asked, in the order of the table."""
    merged, artifact, questions = work.path("merged"), str(work.artifact), work.path("questions.json")
    ask = "ask_transformers"
    listed = [
        Check("transformers 4.48.3", "merged", T448, ask, (merged, questions), short=True),
        Check("transformers 4.57.3", "merged", T457, ask, (merged, questions)),
        Check("transformers 5", "merged", None, ask, (merged, questions), short=True),
        Check("PEFT, documented code", "artifact", None, "ask_peft", (artifact, str(work.base), questions), short=True),
        Check("PEFT 0.17.1, documented code", "artifact", T457, "ask_peft", (artifact, str(work.base), questions)),
    ]
    written = work.path("vllm/adapter")
    for version in _OLD_PEFT:
        short = version == _OLD_PEFT[0]
        listed.append(
            Check(f"PEFT {version}", "adapter", old_peft(version), "read_adapter", (written, questions), short=short)
        )
    gguf, lora = work.path("gguf"), work.path("gguf-lora")
    listed += [
        Check("PEFT 0.17.1", "adapter", T457, "read_adapter", (written, questions)),
        Check("vLLM 0.32 (CPU)", "merged", VLLM, "ask_vllm", (merged, questions)),
        Check("vLLM 0.32 (CPU)", "base + LoRA", VLLM, "ask_vllm", (work.path("vllm/base"), questions, written)),
        Check(
            "llama.cpp",
            "gguf f16",
            LLAMA_CPP,
            "ask_llama_cpp",
            (f"{gguf}/text.gguf", f"{gguf}/mmproj.gguf", questions),
            goal=0.95,
        ),
        Check(
            "llama.cpp",
            "gguf-lora",
            LLAMA_CPP,
            "ask_llama_cpp",
            (f"{lora}/text.gguf", f"{lora}/mmproj.gguf", questions, f"{lora}/lora.gguf", f"{lora}/chat_template.jinja"),
            goal=0.92,
        ),
    ]
    for outtype in ROUNDED:
        path = work.path(f"gguf-{outtype}")
        files = (f"{path}/text.gguf", f"{path}/mmproj.gguf", questions)
        listed.append(Check("llama.cpp", f"gguf {outtype}", LLAMA_CPP, "ask_llama_cpp", files, goal=0.0))
    repository = str(llava.resolve()) if llava else ""
    listed.append(Check("the original LLaVA", "llava", LLAVA, "ask_llava", (repository, work.path("llava"), questions)))
    return listed


def run(check: Check, work: Work, number: int) -> Result:
    """Run a check in its environment and compare its answers with the kit's."""
    if check.script == "ask_llava" and not check.arguments[0]:
        return Result(missing="not on PyPI: give its repository, make foreign LLAVA=DIR")
    output, start = work.path(f"answers-{number}.json"), time.monotonic()
    arguments = [*check.arguments]
    # After the questions: what follows them is optional.
    arguments.insert(arguments.index(work.path("questions.json")) + 1, output)
    try:
        python, variables = python_of(check.environment)
        done = subprocess.run(
            [str(python), "-m", f"tools.foreign.{check.script}", *arguments],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=False,
        )
    except UnavailableError as error:
        return Result(missing=str(error))
    except subprocess.TimeoutExpired:
        return Result(missing=f"no answer within {_ASK_SECONDS // 60} minutes")
    seconds = time.monotonic() - start
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return Result(seconds=seconds, missing=f"failed: {(lines or ['without output'])[-1][:200]}")
    return _compared(Path(output), Path(work.path("kit.json")), seconds)


def _compared(theirs: Path, ours: Path, seconds: float) -> Result:
    """Compare two files of answers, and their logits where both have them."""
    answers, expected = (json.loads(path.read_text(encoding="utf-8"))["answers"] for path in (theirs, ours))
    equal = sum(answer == other for answer, other in zip(answers, expected, strict=False))
    difference = None
    if theirs.with_suffix(".npy").is_file():
        logits, reference = (np.load(path.with_suffix(".npy")) for path in (theirs, ours))
        width = min(logits.shape[1], reference.shape[1])
        error = np.linalg.norm(logits[:, :width] - reference[:, :width])
        difference = float(error / np.linalg.norm(reference[:, :width]))
    # A missing answer is a wrong one; a script without any asks nothing.
    return Result(equal, len(expected) if answers else 0, difference, seconds)


def verdict(check: Check, result: Result, *, trained: bool) -> str:
    """Say whether a check passed: `ok`, `measured` (it has no goal), `missed`, or why it was not run."""
    if result.missing:
        return result.missing
    if result.asked and trained and result.equal < check.goal * result.asked:
        return f"missed: {check.goal:.0%} wanted"
    if result.asked and not trained and result.difference is not None and result.difference > 1e-3:
        return "missed: logits differ"
    return "ok" if check.goal else "measured"


def main() -> int:
    """Ask everything, print the table, and return 1 if a goal was missed, or in the short form anything not run."""
    parser = argparse.ArgumentParser(prog="python -m tools.foreign", description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run, such as quickstart/run; else a tiny one is asked")
    parser.add_argument("--llava", type=Path, help="a clone of github.com/haotian-liu/LLaVA")
    parser.add_argument("--short", action="store_true", help="one transformers 4 and one old PEFT: what CI runs")
    given = parser.parse_args()
    work = prepare(given.run, HOME / "work" / ("run" if given.run else "tiny"))
    table = FittingTable(
        "What other software makes of it",
        [
            Column("software", is_number=False),
            Column("form", is_number=False),
            Column("answers equal"),
            Column("logits, relative", importance=1),
            Column("seconds", importance=2),
            Column("", is_number=False),
        ],
    )
    failed = False
    for number, check in enumerate(check for check in checks(work, given.llava) if check.short or not given.short):
        click.echo(f"asking {check.software}, {check.form} ...")
        result = run(check, work, number)
        said = verdict(check, result, trained=given.run is not None)
        failed |= said.startswith(("missed", "failed")) or (given.short and said != "ok")
        table.add(
            check.software,
            check.form,
            f"{result.equal} of {result.asked}" if result.asked else "-",
            "-" if result.difference is None else f"{result.difference:.1e}",
            f"{result.seconds:.0f}",
            said,
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
