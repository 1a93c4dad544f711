"""Commands that look: inspect a sample, show the environment."""

from __future__ import annotations

import click

from lora_llava.cli.common import leave_torch_out, make_console, open_recipe, quiet_libraries


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--index", type=click.IntRange(min=0), default=0, show_default=True, help="Which training record.")
@click.option("--stage", type=click.Choice(["align", "instruct"]), help="Which stage [the recipe's last].")
def inspect(recipe: str, overrides: tuple[str, ...], index: int, stage: str | None) -> None:
    """Show one training record as the model will see it.

    Each token, and whether it is learnt; lengths and tensors. Reads the tokenizer and the data of RECIPE, not
    the model.
    """
    settings = open_recipe(recipe, overrides)
    leave_torch_out(settings)
    quiet_libraries()
    from lora_llava.doctor.inspection import inspect_record

    make_console().print(inspect_record(settings, stage, index))


@click.command()
def env() -> None:
    """Show versions, device and memory, for a report."""
    quiet_libraries()
    from lora_llava.system.environment import describe_environment

    rows = describe_environment()
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")
