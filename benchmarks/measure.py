"""Measure trainers next to each other: each in its own process, alternating steps, medians of the times."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from lora_llava.artifact import library_versions
from lora_llava.system.device import pick_device, pick_dtype

SETS = ("S1", "V1", "V4", "V8", "V11", "MX")
LOSS_TOLERANCE = {"fp32": 6e-5, "fp16": 1e-2, "bf16": 1e-2}
"""Relative difference of the first losses; the Trainer rounds what it logs to four digits."""
FLOPS_A_WEIGHT = 4
"""Of a frozen weight and token: a product on the way forward, and one for the gradient of what came in."""
MATRIX = {"cuda": 8192, "cpu": 2048}
"""Side of the square matrices whose product shows what the machine can do."""
NORM_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 5e-2}


class EndedEarlyError(click.ClickException):
    """A peer's process is gone; what it said is on the terminal."""


class Peer:
    """A peer's process, which does one job after another."""

    def __init__(self, name: str, model: str) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.peer", name, f"--model={model}"]
        command.append(f"--threads={torch.get_num_threads()}")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.norms: dict[str, float] = {}
        self._is_ready = False

    def _read(self, key: str) -> dict[str, Any]:
        """Read up to the next line that holds `key`."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{") and key in (facts := json.loads(line)):
                return dict(facts)
        raise EndedEarlyError(f"{self.name} ended early; its messages are above")

    def _write(self, line: str) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EndedEarlyError(f"{self.name} ended early; its messages are above") from None

    def begin(self, job: Mapping[str, Any]) -> None:
        """Give the peer its next job."""
        self.seconds, self.cpu_seconds, self.losses, self.norms = [], [], [], {}
        self._write(json.dumps(job))

    def wait_until_ready(self) -> None:
        """Wait until the peer has done what comes before its next step, the building of its model included."""
        if not self._is_ready:
            self._read("ready")
            self._is_ready = True

    def step(self) -> float:
        """Let the peer do one step; return the seconds that it took."""
        self.wait_until_ready()
        self._is_ready = False
        self._write("go")
        facts = self._read("loss")
        self.seconds.append(facts["seconds"])
        self.cpu_seconds.append(facts["cpu_seconds"])
        self.losses.append(facts["loss"])
        self.norms = self.norms or facts["gradient_norms"]
        return self.seconds[-1]

    def end(self) -> dict[str, Any]:
        """End the job; return what the peer says of it."""
        self.wait_until_ready()
        self._is_ready = False
        self._write("stop")
        return self._read("supervised")

    def result(self, facts: Mapping[str, Any], questions: int, warmup: int, rate: float) -> dict[str, Any]:
        """Return the figures of the job; `facts`: those of `end`, `rate`: FLOP/s of a large matrix product here."""
        seconds = statistics.median(self.seconds[warmup:])
        possible = FLOPS_A_WEIGHT * facts["linear_weights"] / (seconds * rate)
        return {
            "questions_per_second": round(questions / seconds, 3),
            "supervised_tokens_per_second": round(facts["supervised"] / seconds, 1),
            "computed_tokens_per_second": round(facts["computed_tokens"] / seconds, 1),
            "useful_utilization": round(possible * facts["separate_tokens"], 3),
            "computed_utilization": round(possible * facts["computed_tokens"], 3),
            "seconds": [round(value, 3) for value in self.seconds],
            # Of the process: what else runs on the machine changes them little.
            "cpu_seconds": [round(value, 3) for value in self.cpu_seconds],
            "first_loss": self.losses[0],
            "gradient_norms": self.norms,
            **facts,
        }

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True)
class Series:
    """The steps that each peer does of a set."""

    questions: int
    warmup: int
    steps: int
    precision: str

    def job(self, set_name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return a peer's job; it has one step more than are asked for, so that the parent ends it."""
        return {"set": set_name, "questions": self.questions, "steps": self.warmup + self.steps + 1, **options}


def summary(
    set_name: str,
    options: Mapping[str, Mapping[str, Any]],
    rows: dict[str, dict[str, Any]],
    rate: float,
    series: Series,
) -> dict[str, Any]:
    """Print the results of a set, and return them for the report."""
    same = did_the_same(rows, series.precision)
    facts = {"set": set_name, "questions_per_step": series.questions, "matrix_rate": rate, "options": dict(options)}
    show(facts | {"peers": rows})
    return facts | {"peers": rows, "ranked": same}


def matrix_rate() -> float:
    """Measure a large matrix product in the precision of the runs, in FLOP/s: the fastest of a few."""
    device = pick_device()
    side, dtype = MATRIX[device.type], pick_dtype("auto", device)
    left, right = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(2 * side**3 / min(times))


def did_the_same(rows: dict[str, dict[str, Any]], precision: str) -> bool:
    """Compare what the peers did: work, first losses, and the gradients of each group, which must not be zero."""
    first, *others = rows.values()
    loss, norms = first["first_loss"], first["gradient_norms"]
    same = norms["projector"] > 0 and all(
        row["work_sha256"] == first["work_sha256"]
        and abs(row["first_loss"] - loss) <= LOSS_TOLERANCE[precision] * loss
        and all(
            abs(row["gradient_norms"][key] - norm) <= NORM_TOLERANCE[precision] * norm for key, norm in norms.items()
        )
        for row in others
    )
    if not same:
        click.echo("not ranked: the peers did not do the same")
    return same


def show(result: dict[str, Any]) -> None:
    """Print a line for each peer."""
    for name, row in result["peers"].items():
        click.echo(
            f"{result['set']:4} {name:30} {row['questions_per_second']:8.2f} questions/s  "
            f"peak {row['peak_bytes'] / 2**20:7,.0f} MiB  first loss {row['first_loss']:.5f}"
            f"{relative(result['peers'], name)}"
        )


def relative(peers: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Say how many times as fast the first peer is as another."""
    first = next(iter(peers))
    if name == first:
        return ""
    return f"  {first} {peers[first]['questions_per_second'] / peers[name]['questions_per_second']:.2f} times"


def write_report(path: Path | None, **facts: Any) -> None:
    """Write the results as JSON, with what they depend on."""
    if path is None:
        return
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "machine": machine_name(),
        "versions": library_versions(),
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def machine_name() -> str:
    """Name the device and the precision of the runs."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {precision_name()}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {precision_name()}"


def precision_name() -> str:
    """Return the precision in which the trainers compute on this machine, as recipes name it."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return names[pick_dtype("auto", pick_device())]
