"""Measure the kit and other trainers on this machine's CPU, in one run.

python -m benchmarks [--sets V8,V1] [--steps 9] [--no-ladder] [--output benchmarks/results/cpu.json]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu import Fleet, compare
from benchmarks.measure import SETS, Series, precision_name, write_report
from benchmarks.peers import LADDER
from benchmarks.work import SHAPES

PEERS = ("lora-llava", "hf-trainer", "trl")
QUESTIONS = {"V11": 22, "MX": 16}
"""Conversations of a step, where it is not 8: V11 needs whole images, MX enough of each kind."""
LADDER_SET = "V8"


@click.command()
@click.option("--sets", default=",".join(SETS), show_default=True, help="Sets to measure; empty: none.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Peers to measure.")
@click.option("--ladder/--no-ladder", default=True, help=f"Measure what each part brings, on {LADDER_SET}.")
@click.option("--steps", default=9, show_default=True, help="Timed steps.")
@click.option("--warmup", default=1, show_default=True, help="Steps before.")
@click.option(
    "--micro-batch", default=2, show_default=True, help="Conversations of a micro-batch; ours has their tokens."
)
@click.option("--model", type=click.Choice(list(SHAPES)), default="small", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(
    sets: str, peers: str, ladder: bool, steps: int, warmup: int, micro_batch: int, model: str, output: Path | None
) -> None:
    """Measure the kit and other trainers."""
    options = {"micro_batch": micro_batch}
    results: list[dict[str, Any]] = []
    rungs = None

    def measure(name: str, trainers: Iterable[str]) -> dict[str, Any] | None:
        series = Series(QUESTIONS.get(name, 8), warmup, steps, precision_name())
        # New processes for each set: their peak memory counts from their start.
        fleet = Fleet(model)
        try:
            return compare(fleet, name, dict.fromkeys(trainers, options), series, math.inf)
        finally:
            fleet.close()

    def save() -> None:
        write_report(output, model=model, micro_batch=micro_batch, results=results, ladder=rungs)

    for name in filter(None, sets.split(",")):
        if result := measure(name, peers.split(",")):
            results.append(result)
        save()
    if ladder:
        rungs = measure(LADDER_SET, LADDER)
        save()


if __name__ == "__main__":
    main()
