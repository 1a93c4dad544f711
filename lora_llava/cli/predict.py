"""Commands that ask a model about a data set: predict, pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_llava.cli.common import make_console, open_model, print_lines, quiet_libraries
from lora_llava.cli.options import (
    PATH,
    base_option,
    data_options,
    decoding_options,
    metric_option,
    refuse_split,
    refuse_unused,
    settings_errors,
    split_of,
    template_option,
    together,
)
from lora_llava.generation.output import CSV, JSONL, SKIPPED, refuse_output

if TYPE_CHECKING:
    from lora_llava.recipe.stages import DataSettings

_DATA = ("image_root", "encoding", "split", "answer_prompt", "max_records", "on_bad_record", "max_bad_records")
"""Options that are settings of the data, next to its path and columns."""

_bad_record_options = together(
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
)


def _data_settings(kind: type[DataSettings], path: str, columns: Any, options: Mapping[str, Any]) -> Any:
    """Turn the options into settings of the data. Raises click.UsageError if they do not fit together."""
    if options["on_bad_record"] == "error":
        refuse_unused("--on-bad-record error stops at the first one", "max_bad_records")
    with settings_errors():
        return kind.model_validate({"path": path, "columns": columns, **{key: options[key] for key in _DATA}})


@click.command()
@click.argument("model", type=PATH)
@click.option("--data", help="Questions, in any form of training data; answers are optional.")
@click.option("--images", type=PATH, metavar="DIR", help="Instead of --data: ask about every image below DIR.")
@click.option("--question", help="The question to ask about every image.")
@click.option("--output", type=PATH, required=True, help="File of the answers: .csv or .jsonl.")
@data_options(split="test")
@_bad_record_options
@decoding_options
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
    """Answer questions in bulk, without references.

    The questions are those of a dataset, or one about each image of a folder. MODEL is what a stage wrote, or a merged
    model: a directory, or USER/REPO[@REVISION] on the Hub. Every answer comes with its log-probability, in the order of
    the data and next to its other columns. Run the same command again to continue one that was stopped. See
    docs/predict.md.
    """
    if (data is None) == (images is None):
        raise click.UsageError("give --data, or --images with --question")
    if (images is None) != (question is None):
        raise click.UsageError("--question goes with --images; with --data, the questions are in the data")
    from lora_llava.data.sources.missing import refuse_missing
    from lora_llava.recipe.stages import QuestionSettings

    columns = options.pop("columns")
    if images is not None:
        # A folder is a table of images, all with the same question.
        columns = {"image": "image", "question": "question"}
    if data is not None:
        refuse_split(options["split"], data)
    options["split"] = "test" if data is None else split_of(data, options["split"], "test")
    settings = _data_settings(QuestionSettings, data or str(images), columns, options)
    skips = settings.on_bad_record == "skip"
    refuse_output(output, (CSV, JSONL), *([output.with_name(output.name + SKIPPED)] if skips else []))
    if data is not None:
        refuse_missing(settings)
    directory = open_model(model, base_model)
    quiet_libraries()
    from lora_llava.generation import predict as run
    from lora_llava.generation.asking import AskedModel

    console = make_console()
    asked = run.PredictSettings(settings, question, options["max_new_tokens"], options["max_rows"])
    print_lines(run.predict(AskedModel(directory, base_model, options["template"]), asked, output, console), console)


def _not_nan(_: click.Context, __: click.Parameter, value: float) -> float:
    """Return a number. Raises click.BadParameter for NaN, which is within no range, and which click lets pass."""
    if value != value:
        raise click.BadParameter("is not a number")
    return value


@click.command()
@click.argument("model", type=PATH)
@click.option("--data", required=True, help="Answered questions, in any form of training data.")
@click.option("--output", type=PATH, required=True, help="File of the pairs: .json or .jsonl.")
@data_options(split="train")
@_bad_record_options
@click.option(
    "--samples",
    "num_samples",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Answers drawn for each question.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True, max=100),
    callback=_not_nan,
    default=1.0,
    show_default=True,
    help="Higher: more varied answers.",
)
@click.option("--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Seed of all draws.")
@click.option(
    "--per-question",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Wrong samples taken of each.",
)
@click.option(
    "--at-least",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples that must agree on a wrong answer.",
)
@click.option(
    "--other-image",
    type=click.FloatRange(min=0, max=1),
    callback=_not_nan,
    default=0.5,
    show_default=True,
    help="Share of the first questions also asked about another image.",
)
@metric_option
@decoding_options
@base_option
@template_option
def pairs(model: Path, output: Path, data: str, base_model: str | None, template: str | None, **options: Any) -> None:
    """Make preference pairs from the wrong answers of a model.

    The reference of a question is the chosen answer. Rejected are wrong ones among answers drawn from MODEL, and its
    answers to the same question about another image. Stage `prefer` trains on the file. See docs/preference.md.
    """
    from lora_llava.data.sources.missing import refuse_missing
    from lora_llava.recipe.stages import DataSettings

    refuse_split(options["split"], data)
    options["split"] = split_of(data, options["split"], "train")
    settings = _data_settings(DataSettings, data, options.pop("columns"), options)
    refuse_output(output, (".json", JSONL))
    refuse_missing(settings)
    directory = open_model(model, base_model)
    quiet_libraries()
    from lora_llava.evaluation.pairs import PairSettings, make_pairs
    from lora_llava.generation.asking import AskedModel

    console = make_console()
    how = {key: value for key, value in options.items() if key not in _DATA}
    model_to_ask = AskedModel(directory, base_model, template)
    print_lines(make_pairs(model_to_ask, PairSettings(settings, **how), output, console), console)
