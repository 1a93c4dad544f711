"""Measure the kit and other trainers on a GPU: LLaVA-1.5's shapes with random weights, in 4 bits, in some minutes.

python -m benchmarks.gpu --minutes 15 [--model 7b] [--output benchmarks/results/h100_7b.json]

The most informative comparisons come first; those for which no time is left are skipped. Each trainer has one process
for all of them, and their steps alternate, so that all see the same machine. Options of the other trainers come from a
table; one that runs out of memory halves its micro-batch. The kit's planner chooses for the kit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import EndedEarlyError, Peer, Series, matrix_rate, precision_name, summary, write_report
from benchmarks.peers import PACKAGES, PEERS
from benchmarks.work import SHAPES

OURS = "lora-llava"
QUESTIONS = {"V11": 44, "MX": 32}
"""Conversations of a step, where it is not 32."""
COMPARISONS = (
    ("V11", 24.0),
    ("V1", 24.0),
    ("V4", 24.0),
    ("S1", 24.0),
    ("V11", 12.0),
    ("MX", 24.0),
    ("V11", 16.0),
    ("V1", 12.0),
    ("S1", 12.0),
)
"""Sets, and sizes of cards in GiB, the most telling first."""
MICRO_BATCH = {24.0: 16, 16.0: 4, 12.0: 1}
"""Conversations of the other peers' micro-batches by size of the card, all layers recomputed: without, a 7B with r 128
holds two of them in 24 GiB, which is slower."""
MIN_STEPS = 3
"""Timed steps that a median needs."""


class Fleet:
    """The peers' processes, started when first needed; one that ended is started again."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.running: dict[str, Peer] = {}

    def peer(self, name: str) -> Peer:
        """Return the process of a peer."""
        if name not in self.running:
            self.running[name] = Peer(name, self.model)
        return self.running[name]

    def drop(self, name: str) -> None:
        """End the process of a peer, which failed."""
        self.running.pop(name).kill()

    def close(self) -> None:
        """End all."""
        for name in list(self.running):
            self.drop(name)


def options_for(name: str, cap: float, questions: int) -> dict[str, Any]:
    """Return the options of a peer's job."""
    common = {"nf4": True, "cap": cap}
    if name == OURS:
        return common
    size = MICRO_BATCH[min(MICRO_BATCH, key=lambda known: abs(known - cap))]
    return common | {"checkpointing": True, "micro_batch": divisor(questions, size)}


def divisor(questions: int, largest: int) -> int:
    """Return the largest divisor of `questions` up to `largest`."""
    return next(size for size in range(largest, 0, -1) if questions % size == 0)


class Running:
    """A peer at its job, with a smaller micro-batch each time that it fails."""

    def __init__(self, fleet: Fleet, name: str, set_name: str, options: dict[str, Any], series: Series) -> None:
        self.fleet, self.name, self.set_name, self.options, self.series = fleet, name, set_name, options, series
        self._begin()

    def _begin(self) -> None:
        self.peer = self.fleet.peer(self.name)
        self.peer.begin(self.series.job(self.set_name, self.options))

    def advance(self, steps: int) -> bool:
        """Have `steps` steps done in all, or be ready for the first; False if the smallest micro-batch fails, too."""
        while True:
            try:
                self.peer.wait_until_ready()
                while len(self.peer.seconds) < steps:
                    self.peer.step()
                return True
            except EndedEarlyError as error:
                self.fleet.drop(self.name)
                click.echo(f"{self.set_name} {self.name}, {self.options}: {error.message}")
                if self.options.get("micro_batch", 1) == 1:
                    return False
                smaller = divisor(self.series.questions, self.options["micro_batch"] // 2)
                self.options = {**self.options, "micro_batch": smaller}
                self._begin()


def compare(
    fleet: Fleet, set_name: str, peers: Mapping[str, dict[str, Any]], series: Series, seconds: float
) -> dict[str, Any] | None:
    """Measure one set with all peers, their steps in turn, fewer if they take more than `seconds`; None if all fail."""
    # All get ready at the same time, and none does a step before.
    running = [Running(fleet, name, set_name, options, series) for name, options in peers.items()]
    running = [job for job in running if job.advance(0)]
    rate, until = 0.0, None
    for number in range(1, series.warmup + series.steps + 1):
        running = [job for job in running if job.advance(number)]
        # While all of them wait.
        rate = max(rate, matrix_rate())
        until = until or time.monotonic() + seconds
        if number >= series.warmup + MIN_STEPS and time.monotonic() > until:
            break
    rows = {job.name: job.peer.result(job.peer.end(), series.questions, series.warmup, rate) for job in running}
    used = {job.name: job.options for job in running}
    return summary(set_name, used, rows, rate, series) if rows else None


def importable(names: list[str]) -> list[str]:
    """Leave out the peers whose packages are not installed, and say so."""
    missing = [name for name in names if name in PACKAGES and find_spec(PACKAGES[name]) is None]
    for name in missing:
        click.echo(f"{name}: not measured, its package {PACKAGES[name]} is not installed")
    return [name for name in names if name not in missing]


@click.command()
@click.option("--model", type=click.Choice(list(SHAPES)), default="7b", show_default=True)
@click.option("--minutes", default=15.0, show_default=True, help="Minutes that the whole may take.")
@click.option("--sets", help="Measure only these sets.")
@click.option("--caps", help="Measure only these sizes of cards, in GiB.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Peers to measure.")
@click.option("--steps", default=12, show_default=True, help="Timed steps, if the minutes allow.")
@click.option("--warmup", default=2, show_default=True, help="Steps before.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the results as JSON, after every set.")
def main(
    model: str, minutes: float, sets: str | None, caps: str | None, peers: str, steps: int, warmup: int, output: Path
) -> None:
    """Measure the kit and other trainers on a GPU."""
    names = importable(peers.split(","))
    comparisons = [
        (name, cap)
        for name, cap in COMPARISONS
        if (sets is None or name in sets.split(",")) and (caps is None or cap in map(float, caps.split(",")))
    ]
    measure_for(minutes, comparisons, names, model, (warmup, steps), output)


def measure_for(
    minutes: float,
    comparisons: list[tuple[str, float]],
    peers: list[str],
    model: str,
    steps: tuple[int, int],
    output: Path | None,
    *,
    alone_up_to: float = 0.0,
) -> list[dict[str, Any]]:
    """Measure as many comparisons as `minutes` allow, and write the report after each.

    `steps`: warm-up and timed; `alone_up_to`: GiB of the largest card on which only the first of `peers` is measured.
    """
    precision = precision_name()
    fleet = Fleet(model)
    results: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * minutes
    spent: list[float] = []
    try:
        for number, (set_name, cap) in enumerate(comparisons):
            started = time.monotonic()
            left = deadline - started
            # The first one starts the processes, too.
            if left < max(spent[1:], default=0.0):
                rest = ", ".join(f"{name} in {size:g} GiB" for name, size in comparisons[number:])
                click.echo(f"left out, for lack of time: {rest}")
                break
            series = Series(QUESTIONS.get(set_name, 32), *steps, precision)
            names = peers[:1] if cap <= alone_up_to else peers
            options = {name: options_for(name, cap, series.questions) for name in names}
            if result := compare(fleet, set_name, options, series, left / (len(comparisons) - number)):
                results.append(result | {"cap": cap})
            spent.append(time.monotonic() - started)
            write_report(output, model=model, micro_batch=None, results=results, ladder=None)
    finally:
        fleet.close()
    return results


if __name__ == "__main__":
    main()
