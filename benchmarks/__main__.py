"""The kit beside its peers, in one run: each in its own process, their steps in turn, medians of the times.

    python -m benchmarks [--sets V8,V1] [--steps 5] [--output benchmarks/results/cpu.json]

Peers whose first loss, gradients or work differ are not ranked: they did not do the same.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.peers import PEERS
from lora_llava.artifact import library_versions

SETS = ("S1", "V1", "V4", "V8", "V11", "MX")
QUESTIONS = {"V11": 22}
"""Conversations of a step, where it is not 16: V11 needs whole images."""
LOSS_TOLERANCE = 6e-5
"""Relative difference of the first losses, in fp32; the Trainer rounds what it logs to four digits."""
NORM_TOLERANCE = 1e-3


class Peer:
    """A peer's process."""

    def __init__(self, name: str, set_name: str, questions: int, steps: int, micro_batch: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.peer", name, set_name, f"--questions={questions}"]
        command += [f"--steps={steps}", f"--micro-batch={micro_batch}", f"--threads={torch.get_num_threads()}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.norms: dict[str, float] = {}

    def read(self, key: str) -> dict[str, Any]:
        """Read up to the next line that holds `key`."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{") and key in (facts := json.loads(line)):
                return dict(facts)
        raise click.ClickException(f"{self.name} ended early; its messages are above")

    def step(self) -> None:
        """Let the peer do one step."""
        assert self.process.stdin
        self.read("ready")
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        facts = self.read("loss")
        self.seconds.append(facts["seconds"])
        self.losses.append(facts["loss"])
        self.norms = self.norms or facts["gradient_norms"]


def measure(set_name: str, names: list[str], warmup: int, steps: int, micro_batch: int) -> dict[str, Any]:
    """Run one set with all peers, their steps in turn."""
    questions = QUESTIONS.get(set_name, 16)
    peers = [Peer(name, set_name, questions, warmup + steps, micro_batch) for name in names]
    for _ in range(warmup + steps):
        for peer in peers:
            peer.step()
    rows = {}
    for peer in peers:
        facts = peer.read("supervised")
        peer.process.wait()
        seconds = statistics.median(peer.seconds[warmup:])
        rows[peer.name] = {
            "questions_per_second": round(questions / seconds, 3),
            "supervised_tokens_per_second": round(facts["supervised"] / seconds, 1),
            "computed_tokens_per_second": round(facts["computed_tokens"] / seconds, 1),
            "seconds": [round(one, 3) for one in peer.seconds],
            "first_loss": peer.losses[0],
            "gradient_norms": peer.norms,
            **facts,
        }
    return {"set": set_name, "questions_per_step": questions, "peers": rows, "ranked": did_the_same(rows)}


def did_the_same(rows: dict[str, dict[str, Any]]) -> bool:
    """Compare what the peers did: work, first losses, and the gradients of each group, which must not be zero."""
    first, *others = rows.values()
    return first["gradient_norms"]["projector"] > 0 and all(
        row["work_sha256"] == first["work_sha256"]
        and abs(row["first_loss"] - first["first_loss"]) <= LOSS_TOLERANCE * first["first_loss"]
        and all(abs(row["gradient_norms"][key] - norm) <= NORM_TOLERANCE * norm for key, norm in norms.items())
        for norms in [first["gradient_norms"]]
        for row in others
    )


def commit() -> str:
    """Name the commit that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@click.command()
@click.option("--sets", default=",".join(SETS), show_default=True, help="Sets to measure.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Peers to measure.")
@click.option("--steps", default=5, show_default=True, help="Timed steps.")
@click.option("--warmup", default=1, show_default=True, help="Steps before.")
@click.option(
    "--micro-batch", default=2, show_default=True, help="Conversations of a micro-batch; ours has their tokens."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(sets: str, peers: str, steps: int, warmup: int, micro_batch: int, output: Path | None) -> None:
    """Measure the kit beside its peers."""
    results = []
    for set_name in sets.split(","):
        results.append(measure(set_name, peers.split(","), warmup, steps, micro_batch))
        for name, row in results[-1]["peers"].items():
            click.echo(
                f"{set_name:4} {name:12} {row['questions_per_second']:8.2f} questions/s  "
                f"peak {row['peak_bytes'] / 2**20:6.0f} MiB  first loss {row['first_loss']:.5f}"
            )
        if not results[-1]["ranked"]:
            click.echo(f"{set_name}: not ranked, the peers did not do the same")
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, fp32",
        "versions": library_versions(),
        "micro_batch": micro_batch,
        "results": results,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
