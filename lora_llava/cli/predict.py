"""Commands that ask a model about a data set: predict, pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_llava.cli.common import make_console, open_model, quiet_libraries
from lora_llava.cli.evaluate import option_problems, parse_columns
from lora_llava.cli.options import base_option, template_option

if TYPE_CHECKING:
    from lora_llava.recipe.stages import DataSettings

_PATH = click.Path(path_type=Path)
_DATA = ("image_root", "split", "answer_prompt", "max_records", "on_bad_record", "max_bad_records")
"""Options that are settings of the data, next to its path and columns."""

_Command = Callable[..., Any]


def _data_options(split: str) -> Callable[[_Command], _Command]:
    """Add the options of the data; `split`: default of the split of a Hugging Face dataset."""
    options = [
        click.option("--image-root", help="Directory of the images [that of the data file]."),
        click.option(
            "--columns",
            callback=lambda _, __, text: parse_columns(text),
            help="For example image=image,question=question.",
        ),
        click.option("--split", default=split, show_default=True, help="Split of a Hugging Face dataset."),
        click.option("--answer-prompt", help="Text appended to each question [as in training]."),
        click.option("--max-records", type=click.IntRange(min=1), metavar="N", help="Use only the first N records."),
        click.option(
            "--on-bad-record",
            type=click.Choice(["error", "skip"]),
            default="error",
            show_default=True,
            help="Stop at an unusable record, or leave it out.",
        ),
        click.option(
            "--max-bad-records",
            type=click.IntRange(min=1),
            default=10,
            show_default=True,
            help="With --on-bad-record skip: stop after more than this many.",
        ),
    ]

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _decoding_options(command: _Command) -> _Command:
    """Add the options of decoding."""
    tokens = click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Maximum tokens per answer."
    )
    rows = click.option(
        "--max-rows", type=click.IntRange(min=1), default=64, show_default=True, help="Questions decoded at once."
    )
    return tokens(rows(command))


def _data_settings(kind: type[DataSettings], path: str, columns: Any, options: Mapping[str, Any]) -> Any:
    """Turn the options into settings of the data. Raises click.UsageError if they do not fit together."""
    from pydantic import ValidationError

    try:
        return kind.model_validate({"path": path, "columns": columns, **{key: options[key] for key in _DATA}})
    except ValidationError as error:
        raise click.UsageError(option_problems(error)) from error


@click.command()
@click.argument("model", type=_PATH)
@click.option("--data", help="Questions, in any form of training data; answers are optional.")
@click.option("--images", type=_PATH, metavar="DIR", help="Instead of --data: ask about every image below DIR.")
@click.option("--question", help="The question to ask about every image.")
@click.option("--output", type=_PATH, required=True, help="File of the answers: .csv or .jsonl.")
@_data_options(split="test")
@_decoding_options
@base_option
@template_option
def predict(
    model: Path,
    output: Path,
    data: str | None,
    images: Path | None,
    question: str | None,
    base_model: str | None,
    **options: Any,
) -> None:
    """Answer the questions of a dataset, or one question about a folder of images.

    MODEL is what a stage wrote, or a merged model: a directory, or USER/REPO[@REVISION] on the Hub. Every answer comes
    with its log-probability, in the order of the data and next to its other columns. Run the same command again to
    continue one that was stopped. See docs/predict.md.
    """
    if (data is None) == (images is None):
        raise click.UsageError("give --data, or --images with --question")
    if (images is None) != (question is None):
        raise click.UsageError("--question goes with --images; with --data, the questions are in the data")
    from lora_llava.recipe.stages import QuestionSettings

    columns = options.pop("columns")
    if images is not None:
        # A folder is a table of images, all with the same question.
        columns = {"image": "image", "question": "question"}
    settings = _data_settings(QuestionSettings, data or str(images), columns, options)
    directory = open_model(model, base_model)
    quiet_libraries()
    from lora_llava.generation import predict as run

    console = make_console()
    asked = run.PredictSettings(settings, question, options["max_new_tokens"], options["max_rows"])
    for line in run.predict(run.AskedModel(directory, base_model, options["template"]), asked, output, console):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
