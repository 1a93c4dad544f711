"""Damage the directories of every loader and converter in many ways: `python -m tests.fuzz --rounds 10000`.

Case N of a loader is the same on every machine, and a run that was stopped continues where it was. Cases run in forks
of a process that has loaded everything once; a fork that dies or hangs costs its case only. Run one alone with
`python -m tests.fuzz --loader gguf --first 4711 --rounds 1`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from lora_llava.system.text import printable
from tests.fuzz.converters import CONVERTERS, make_converters
from tests.fuzz.foreign import LOADERS, SECONDS, Loader, Sandbox, make_loaders

_CHUNK = 200
"""Cases of one fork."""
_SILENT_SECONDS = 60 * SECONDS
"""A fork that reports nothing for this long is stuck where no signal reaches it; others may hold the processor long."""
_ADDRESS_SPACE = 4 * 2**30
"""A fork may reserve this much more than it holds, so that a fault does not take the whole machine's memory."""
_PACKAGE = "/lora_llava/"


@dataclass(slots=True)
class Tally:
    """What came of a loader's cases so far."""

    cases: int = 0
    """Cases done; the next one has this number."""
    refused: int = 0
    seconds: float = 0.0
    """Processor time."""
    faults: dict[str, int] = field(default_factory=dict)
    """Number of faults by kind."""


def main() -> int:
    """Run the cases that are left; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000, help="cases of each loader")
    parser.add_argument(
        "--loader", action="append", choices=(*LOADERS, *CONVERTERS), help="only this loader; can be repeated"
    )
    parser.add_argument("--first", type=int, help="number of the first case; nothing is continued or recorded")
    parser.add_argument("--directory", type=Path, default=Path(".fuzz"), help="progress and faults")
    options = parser.parse_args()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    # transformers formats each configuration for a log that is off: a quarter of the time.
    PreTrainedConfig.__repr__ = object.__repr__
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        loaders = _make_all(Path(scratch), options.loader)
        sandboxes = {name: Sandbox(Path(scratch) / name, loaders[name]) for name in options.loader or loaders}
        # Forks share what is loaded; the collector would copy it.
        gc.freeze()
        if options.first is not None:
            tallies = {name: Tally(cases=options.first) for name in sandboxes}
            _fuzz(sandboxes, tallies, options.first + options.rounds, None)
        else:
            options.directory.mkdir(exist_ok=True)
            tallies = _continued(options.directory, list(sandboxes))
            _fuzz(sandboxes, tallies, options.rounds, options.directory)
    return _report({name: tallies[name] for name in sandboxes})


def _make_all(scratch: Path, names: list[str] | None) -> dict[str, Loader]:
    """Make all loaders, or those of converters alone if no model is asked for."""
    models = {} if names and set(names) <= set(CONVERTERS) else make_loaders(scratch / "models")
    return models | make_converters(scratch / "sets")


def _continued(directory: Path, names: list[str]) -> dict[str, Tally]:
    """Return the tallies of an earlier run, and empty ones for the rest."""
    path = directory / "progress.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: Tally() for name in names} | {name: Tally(**tally) for name, tally in done.items()}


def _fuzz(sandboxes: dict[str, Sandbox], tallies: dict[str, Tally], rounds: int, directory: Path | None) -> None:
    """Run chunks of all loaders in turn up to case `rounds`; record them in `directory`."""
    while left := [name for name in sandboxes if tallies[name].cases < rounds]:
        for name in left:
            tally = tallies[name]
            faults = run_chunk(sandboxes[name], tally, min(rounds, tally.cases + _CHUNK))
            for fault in faults:
                _say(f"{name} {fault['case']}: {fault['kind']}")
                if directory is None:
                    _say(fault["text"])
            if directory is not None:
                with (directory / "faults.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"loader": name, **fault}) + "\n" for fault in faults)
                data = json.dumps({name: asdict(tally) for name, tally in tallies.items()}, indent=1)
                (directory / "progress.json").write_text(data, encoding="utf-8")


def run_chunk(sandbox: Sandbox, tally: Tally, end: int) -> list[dict[str, str]]:
    """Run a loader's next cases in a fork; count them in `tally` and return their faults."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        _run_cases_and_end(sandbox, range(tally.cases, end), writer)
    os.close(writer)
    faults: list[dict[str, str]] = []

    def add(kind: str, text: str) -> None:
        faults.append({"case": str(tally.cases), "kind": kind, "text": text})
        tally.faults[kind] = tally.faults.get(kind, 0) + 1

    with os.fdopen(reader, "rb", buffering=0) as pipe:
        buffer = b""
        while select.select([pipe], [], [], _SILENT_SECONDS)[0] and (data := pipe.read(65_536)):
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                done = json.loads(line)
                tally.refused += done["refused"]
                tally.seconds = round(tally.seconds + done["seconds"], 4)
                if done["kind"]:
                    add(done["kind"], done["text"])
                tally.cases += 1
        # No effect on one that has ended.
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if tally.cases < end and os.waitstatus_to_exitcode(status) != 0:
        add(f"the process ended with {os.waitstatus_to_exitcode(status)}", "")
        tally.cases += 1
    return faults


def _run_cases_and_end(sandbox: Sandbox, cases: range, writer: int) -> NoReturn:
    """Run cases in a fork and end it, whatever happens, without what its parent does at its end."""
    status = 1
    try:
        _run_cases(sandbox, cases, writer)
        status = 0
    finally:
        os._exit(status)


def _run_cases(sandbox: Sandbox, cases: range, writer: int) -> None:
    """Run cases and write a line on each."""
    held = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _ADDRESS_SPACE, held + _ADDRESS_SPACE))
    with tempfile.TemporaryFile() as shown:
        for number in (1, 2):
            os.dup2(shown.fileno(), number)
        for case in cases:
            kind, text, refused, start = "", "", False, time.process_time()
            try:
                refused = sandbox.try_one(case) is not None
            # Not only an Exception: a panic in Rust is none.
            except BaseException as error:  # noqa: BLE001
                kind, text = _kind(error), traceback.format_exc()
            sys.stdout.flush()
            shown.seek(0)
            # Progress bars use carriage returns.
            words = "".join(shown.read().decode("utf-8", "replace").split())
            if not kind and words != printable(words):
                kind, text = "what it shows is not safe for a terminal", repr(words[:2_000])
            shown.seek(0)
            shown.truncate()
            done = {"kind": kind, "text": text, "refused": refused, "seconds": time.process_time() - start}
            os.write(writer, json.dumps(done).encode() + b"\n")


def _kind(error: BaseException) -> str:
    """Name what was raised, and the last line of the kit that it went through."""
    cause = error.__cause__ or error
    where: TracebackType | None = cause.__traceback__
    line = "outside of the kit"
    while where is not None:
        file = where.tb_frame.f_code.co_filename
        if _PACKAGE in file:
            line = f"{file.rpartition(_PACKAGE)[2]}:{where.tb_lineno}"
        where = where.tb_next
    words = str(cause).partition("\n")[0] if isinstance(cause, AssertionError) else ""
    return f"{type(cause).__name__} at {line}{words and f': {words:.80}'}"


def _report(tallies: dict[str, Tally]) -> int:
    """Print a line for each loader and kind of fault."""
    _say(f"{'loader':<12}{'cases':>8}{'refused':>9}{'faults':>8}{'kinds':>7}{'seconds':>9}{'ms each':>9}")
    for name, tally in tallies.items():
        each = 1_000 * tally.seconds / max(1, tally.cases)
        counts = f"{tally.cases:>8}{tally.refused:>9}{sum(tally.faults.values()):>8}{len(tally.faults):>7}"
        _say(f"{name:<12}{counts}{tally.seconds:>9.0f}{each:>9.1f}")
    for name, tally in tallies.items():
        for kind, count in sorted(tally.faults.items()):
            _say(f"{name}: {count} x {kind}")
    return int(any(tally.faults for tally in tallies.values()))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
