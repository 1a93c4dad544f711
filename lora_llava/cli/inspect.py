"""Commands that show something: inspect, env."""

from __future__ import annotations

import click

from lora_llava.cli.common import leave_torch_out, make_console, open_recipe, quiet_libraries


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--index", type=click.IntRange(min=0), default=0, show_default=True, help="Index of the training record.")
@click.option("--stage", metavar="NAME", help="Stage, such as instruct [the last of the recipe].")
def inspect(recipe: str, overrides: tuple[str, ...], index: int, stage: str | None) -> None:
    """Show one training record as the model sees it.

    Prints each token, whether it is supervised, and the tensors of the record. Loads the tokenizer and the data, not
    the model.
    """
    settings = open_recipe(recipe, overrides)
    leave_torch_out(settings)
    quiet_libraries()
    from lora_llava.doctor.inspection import inspect_record

    make_console().print(inspect_record(settings, stage, index))


@click.command()
def env() -> None:
    """Show versions, device and memory, for a bug report."""
    quiet_libraries()
    from lora_llava.system.environment import describe_environment

    rows = describe_environment()
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")
