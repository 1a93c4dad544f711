"""The kit beside its peers on a GPU: LLaVA-1.5's shapes with random weights, in 4 bits, on cards of several sizes.

python -m benchmarks.gpu [--model 7b] [--caps 24,12] [--sets V11,V4,V1,S1] [--output benchmarks/results/h200_7b.json]

Every peer gets the micro-batch and the recomputing that are fastest for it within the cap, found by trying; the kit's
planner chooses for the kit. Then all recompute layers at one micro-batch, to compare memory at equal tokens.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import EndedEarlyError, Peer, measure, write_report
from benchmarks.peers import PEERS
from benchmarks.work import SHAPES
from lora_llava.system.device import pick_device

OURS = "lora-llava"
QUESTIONS = {"V11": 44}
"""Conversations of a step, where it is not 32."""
MICRO_BATCHES = (16, 8, 4, 2, 1)
TRIED_STEPS = 3
EQUAL_MICRO_BATCH = 4


def fastest_options(name: str, common: list[str]) -> list[str]:
    """Find the fastest way for a peer: recomputing or not, each with the largest micro-batch that fits."""
    found: list[tuple[float, list[str]]] = []
    for recomputing in ("--no-checkpointing", "--checkpointing"):
        for size in MICRO_BATCHES:
            options = [*common, recomputing, f"--micro-batch={size}"]
            peer = Peer(name, "V1", TRIED_STEPS, [*options, f"--questions={MICRO_BATCHES[0]}"])
            try:
                for _ in range(TRIED_STEPS):
                    peer.step()
            except (EndedEarlyError, BrokenPipeError):
                continue
            finally:
                peer.process.kill()
            found.append((statistics.median(peer.seconds), options))
            break
    if not found:
        raise click.ClickException(f"{name} does not fit: {' '.join(common)}")
    return min(found)[1]


@click.command()
@click.option("--model", type=click.Choice(list(SHAPES)), default="7b", show_default=True)
@click.option("--caps", default="24,16,12", show_default=True, help="Sizes of cards, in GiB.")
@click.option("--sets", default="V11,V4,V1,S1", show_default=True, help="Sets to measure.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Peers to measure.")
@click.option("--steps", default=20, show_default=True, help="Timed steps.")
@click.option("--warmup", default=5, show_default=True, help="Steps before.")
@click.option("--equal/--no-equal", default=True, help="Compare memory at equal tokens, too.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the results as JSON, after every set.")
def main(
    model: str, caps: str, sets: str, peers: str, steps: int, warmup: int, equal: bool, output: Path | None
) -> None:
    """Measure the kit beside its peers on a GPU."""
    precision = "bf16" if pick_device().type == "cuda" else "fp32"
    results: list[dict[str, Any]] = []
    common = [f"--model={model}", "--nf4"]

    def run(name: str, options: dict[str, list[str]], **facts: Any) -> None:
        made = measure(name, options, QUESTIONS.get(name, 32), warmup, steps, precision)
        results.append(made | facts)
        write_report(output, model=model, micro_batch=EQUAL_MICRO_BATCH, results=results, ladder=None)

    for cap in caps.split(","):
        click.echo(f"{model}, {cap} GiB")
        capped = [*common, f"--cap={cap}"]
        options = {name: capped if name == OURS else fastest_options(name, capped) for name in peers.split(",")}
        for name in sets.split(","):
            run(name, options, cap=float(cap))
    if equal:
        click.echo(f"{model}, {EQUAL_MICRO_BATCH} conversations a micro-batch, all recomputing layers")
        same = [*common, "--checkpointing", f"--micro-batch={EQUAL_MICRO_BATCH}"]
        for name in sets.split(","):
            run(name, dict.fromkeys(peers.split(","), same), cap=None)


if __name__ == "__main__":
    main()
