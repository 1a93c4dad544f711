"""Measure time and memory of planning the steps of a large data set: `python -m benchmarks.planning`.

The data are shaped like LLaVA-1.5's instruction data: 665,000 conversations, most of them about an image that others
share, lengths mixed, some of text alone.
"""

from __future__ import annotations

import random
import resource
import time

import click

from lora_llava.data.packing import PlanItem, RowSettings, make_plan
from lora_llava.recipe.schedule import count_steps

BATCH_SIZE = 128
PREFIX_TOKENS = 616
"""Of the system prompt and an image."""


def make_items(conversations: int) -> list[PlanItem]:
    """Make conversations of mixed lengths: every seventh is text alone, about three of the others share an image."""
    rng = random.Random(0)
    images = max(1, conversations * 6 // 7 // 3)
    return [
        PlanItem(rng.randint(40, 1500), 0, -1)
        if number % 7 == 0
        else PlanItem(PREFIX_TOKENS + rng.randint(20, 600), PREFIX_TOKENS, rng.randrange(images))
        for number in range(conversations)
    ]


@click.command()
@click.option("--conversations", default=665_000, show_default=True)
@click.option("--tokens-per-row", default=4096, show_default=True)
def main(conversations: int, tokens_per_row: int) -> None:
    """Plan one epoch, with trees and without, and say what it took."""
    items = make_items(conversations)
    for packing in ("tree", "none"):
        started = time.perf_counter()
        settings = RowSettings(tokens_per_row, branches_per_tree=8, packing=packing)
        num_steps = count_steps(len(items), BATCH_SIZE, num_train_epochs=1.0)
        plan = make_plan(items, settings, batch_size=BATCH_SIZE, num_steps=num_steps, seed=0)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        click.echo(
            f"packing {packing}: {plan.num_conversations:,} conversations in {len(plan.steps):,} steps planned in "
            f"{seconds:.1f} s, at most {peak:.2f} GiB; {plan.share_saved:.0%} of the tokens are saved"
        )


if __name__ == "__main__":
    main()
