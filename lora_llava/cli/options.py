"""Options that several commands share. `--base`, their former name, still works."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from lora_llava.conversation.templates import TEMPLATES
from lora_llava.errors import RecipeError
from lora_llava.recipe.choices import MetricSetting
from lora_llava.system.names import did_you_mean, similar
from lora_llava.system.text import listed, printable

PATH = click.Path(path_type=Path)
"""Type of an option or argument that names a file or directory, which need not exist."""
_CHOICES = ("dequantized", "original")
"""What to merge into: the base as dequantized in training, or the original weights."""

COLUMNS_EXAMPLE = """'{image: COLUMN, question: {text: "Is it cracked?"}, answer: COLUMN}'"""
"""Columns with a text that is the same for all records."""

_Command = Callable[..., Any]

onto_option = click.option(
    "--onto",
    type=click.Choice(_CHOICES),
    help="Merge into the base as dequantized in training, or into the original weights [as in training].",
)
template_option = click.option("--template", help=f"Chat template, if the model has none: {', '.join(TEMPLATES)}.")
encoding_option = click.option("--encoding", help="Encoding of a text file, such as cp1252 [that of its bytes].")
metric_option = click.option(
    "--metric",
    type=click.Choice(get_args(MetricSetting)),
    default="auto",
    show_default=True,
    help="How answers are scored.",
)


def together(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Return a decorator that adds several options, in their order."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


decoding_options = together(
    click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Maximum tokens per answer."
    ),
    click.option(
        "--max-rows", type=click.IntRange(min=1), default=64, show_default=True, help="Questions decoded at once."
    ),
)


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


def parse_columns(text: str | None) -> dict[str, Any] | None:
    """Parse `key=column,key=column`, or a mapping as in a recipe. Raises click.UsageError for anything else."""
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        return _mapping(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    columns = {key.strip(): value.strip() for key, _, value in pairs}
    if len(columns) < len(pairs) or not all(key and value for key, value in columns.items()):
        raise click.UsageError(
            f"--columns {text!r}: write it as image=COLUMN,question=COLUMN,answer=COLUMN, each key once, or as in "
            f"a recipe: {COLUMNS_EXAMPLE}"
        )
    return columns


def _mapping(text: str) -> dict[str, Any]:
    from lora_llava.recipe.file import parse_yaml

    try:
        columns = parse_yaml(text, "--columns")
    except RecipeError as error:
        raise click.UsageError(f"{error}; write it as in a recipe: {COLUMNS_EXAMPLE}") from error
    if not isinstance(columns, dict) or not all(isinstance(key, str) for key in columns):
        raise click.UsageError(f"--columns {text!r}: is no mapping of YAML; write it as in a recipe: {COLUMNS_EXAMPLE}")
    return columns


def data_options(split: str, *, several: bool = False) -> Callable[[_Command], _Command]:
    """Add the options of the data next to its path; `split`: what `split_of` takes if none is given.

    `several`: for a command that takes several sources, with a directory of images for all or for each.
    """
    of_each = "; with several --data, once for all or once for each" if several else ""
    return together(
        click.option(
            "--image-root", multiple=several, help=f"Directory of the images [that of the data file]{of_each}."
        ),
        click.option(
            "--columns",
            callback=lambda _, __, text: parse_columns(text),
            help=f"Such as image=file,question=question,answer=label, or as in a recipe: {COLUMNS_EXAMPLE}.",
        ),
        encoding_option,
        click.option("--split", help=f"Split of a data set [{split}, or the only one]."),
        click.option("--answer-prompt", help="Text appended to each question [as in training]."),
        click.option("--max-records", type=click.IntRange(min=1), metavar="N", help="Use only the first N records."),
    )


def split_of(path: str, given: str | None, usual: str) -> str:
    """Return the split to ask about: the given one, or the only one of a directory, or the usual one."""
    if given is not None:
        return given
    from lora_llava.data.sources.columns import splits_of

    # Unlike that of Path, this is False for a name that is too long, which the reader of the data refuses.
    names = splits_of(Path(path)) if os.path.isdir(path) else []  # noqa: PTH112
    if len(names) == 1 and names != [usual]:
        click.echo(printable(f"Note: the questions are those of {names[0]}, the only split of {path}"), err=True)
        return names[0]
    return usual


def refuse_split(split: str | None, *paths: str) -> None:
    """Raise click.UsageError for `--split` if all data are files, unless it is a slice of a parquet file."""
    from lora_llava.recipe.fields import RECORD_FILES

    files = RECORD_FILES if "[" in (split or "") else (*RECORD_FILES, ".parquet")
    if all(path.endswith(files) and not os.path.isdir(path) for path in paths):  # noqa: PTH112 - as in `split_of`
        refuse_unused(f"{' and '.join(paths)} {'is' if len(paths) == 1 else 'are'} without splits", "split")


def refuse_unused(reason: str, *names: str) -> None:
    """Raise click.UsageError if the command line gives one of these parameters, which have no effect."""
    context = click.get_current_context()
    for parameter in context.command.params:
        is_given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
        if parameter.name in names and is_given:
            raise click.UsageError(f"{parameter.opts[0]} has no effect: {reason}; leave it out")


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turn an error of settings that options gave into a click.UsageError with a line for each problem."""
    from pydantic import ValidationError

    from lora_llava.recipe.columns import ColumnSettings

    try:
        yield
    except ValidationError as error:
        lines = []
        for details in error.errors():
            # All sources of the data have the same options.
            names = [part for part in details["loc"] if isinstance(part, str) and part not in ("data", "others")]
            text = details["msg"].removeprefix("Value error, ")
            if details["type"] == "extra_forbidden" and names[:-1] == ["columns"]:
                known = ColumnSettings.model_fields
                text = f"unknown key. {did_you_mean(similar(names[-1], known), f'There are {listed([*known])}.')}"
            lines.append((f"--{'.'.join(names)}: " if names else "") + text)
        raise click.UsageError("\n".join(dict.fromkeys(lines))) from error
