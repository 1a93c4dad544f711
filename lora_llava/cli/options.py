"""Options that several commands have, under one name in all of them; `--base`, their former name, still works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

CHOICES = ("dequantized", "original")
"""What to merge onto: the base as the adapter saw it in training, or as it is stored."""

Command = Callable[..., Any]


def base_option(
    command: Command, *, about: str = "The base, if it is not where the artifact says: directory or hub id."
) -> Command:
    """Add `--base-model`: where the base of an artifact is."""
    former = click.option("--base", is_eager=True, hidden=True, expose_value=False, callback=_take_former_name)
    return click.option("--base-model", metavar="DIR", help=about)(former(command))


def _take_former_name(context: click.Context, _: click.Parameter, value: str | None) -> None:
    """Hand the value of `--base` to the option that has its meaning now, unless that is given too."""
    if value is not None:
        has_onto = any(one.name == "onto" for one in context.command.params)
        name = "onto" if has_onto and value in CHOICES else "base_model"
        context.default_map = {**(context.default_map or {}), name: value}


def onto_option(command: Command) -> Command:
    """Add `--onto`: which form of the base to merge into."""
    return click.option(
        "--onto",
        type=click.Choice(CHOICES),
        help="Merge into the base as the adapter saw it, or as it is stored [as it was trained].",
    )(command)


def template_option(command: Command) -> Command:
    """Add `--template`: the form in which a model that was made elsewhere is asked."""
    return click.option("--template", help="Template of a model that has none beside it: vicuna_v1, chatml or plain.")(
        command
    )
