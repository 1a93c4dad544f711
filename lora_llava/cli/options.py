"""Options that several commands share. `--base`, their former name, still works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lora_llava.conversation.templates import TEMPLATES

_CHOICES = ("dequantized", "original")
"""What to merge into: the base as dequantized in training, or the original weights."""

_Command = Callable[..., Any]


def base_option(
    command: _Command, *, text: str = "Base model, if not where the artifact says: directory or Hub id."
) -> _Command:
    """Add `--base-model`: the location of the base model."""
    former = click.option("--base", is_eager=True, hidden=True, expose_value=False, callback=_take_former_name)
    return click.option("--base-model", metavar="DIR", help=text)(former(command))


def _take_former_name(context: click.Context, _: click.Parameter, value: str | None) -> None:
    """Pass the value of `--base` to the option that replaces it, unless that is given too."""
    if value is not None:
        has_onto = any(parameter.name == "onto" for parameter in context.command.params)
        name = "onto" if has_onto and value in _CHOICES else "base_model"
        context.default_map = {**(context.default_map or {}), name: value}


def onto_option(command: _Command) -> _Command:
    """Add `--onto`: which weights of the base to merge into."""
    return click.option(
        "--onto",
        type=click.Choice(_CHOICES),
        help="Merge into the base as dequantized in training, or into the original weights [as in training].",
    )(command)


def template_option(command: _Command) -> _Command:
    """Add `--template`: the chat template of a model that does not come with one."""
    return click.option("--template", help=f"Chat template, if the model has none: {', '.join(TEMPLATES)}.")(command)
