"""The command that evaluates a model: eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from lora_llava.cli.common import make_console, open_model, quiet_libraries
from lora_llava.cli.options import base_option, template_option
from lora_llava.recipe.choices import MetricSetting
from lora_llava.system.files import refuse_results_in, shown_path

if TYPE_CHECKING:
    from pydantic import ValidationError

    from lora_llava.recipe.settings import EvaluationSettings

_EVALUATION = Path("evaluation")
_PATH = click.Path(path_type=Path)


_DATA = ("path", "image_root", "split", "columns", "answer_prompt", "max_records")
"""Options that are settings of the data."""


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Parse `key=column,key=column`. Raises click.UsageError for anything else."""
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key.strip() and value.strip() for key, _, value in pairs):
        raise click.UsageError(f"--columns {text!r}: write it as image=COLUMN,question=COLUMN,answer=COLUMN")
    return {key.strip(): value.strip() for key, _, value in pairs}


@click.command("eval")
@click.argument("artifact", type=_PATH)
@click.option(
    "--data",
    "path",
    required=True,
    help="LLaVA JSON or JSONL; or, with --columns, flat JSON, CSV, parquet, a directory or a Hub id.",
)
@click.option("--image-root", help="Directory of the images [that of the data file].")
@click.option(
    "--columns",
    callback=lambda _, __, text: parse_columns(text),
    help="For example image=image,question=question,answer=answer.",
)
@click.option("--split", default="test", show_default=True, help="Split of a Hugging Face dataset.")
@click.option("--answer-prompt", help="Text appended to each question [as in training].")
@click.option("--max-records", type=click.IntRange(min=1), metavar="N", help="Evaluate only the first N records.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True, help="Maximum tokens per answer."
)
@click.option(
    "--max-rows",
    "batch_size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Questions decoded at once.",
)
@click.option(
    "--metric",
    type=click.Choice(get_args(MetricSetting)),
    default="auto",
    show_default=True,
    help="How answers are scored.",
)
@click.option("--by", multiple=True, metavar="KEY", help="Break accuracy down by a key or column; repeatable.")
@click.option("--no-base", is_flag=True, help="Do not ask the base.")
@click.option(
    "--base-questions",
    type=click.IntRange(min=0),
    default=300,
    show_default=True,
    help="Number of questions to ask the base; 0: all.",
)
@click.option(
    "--blind",
    "blind_questions",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ask N questions again without their images.",
)
@click.option("--start", type=_PATH, help="Another artifact on the same base to compare with.")
@click.option("--output", type=_PATH, default=_EVALUATION, show_default=True, help="Directory of the results.")
@base_option
@template_option
def evaluate(
    artifact: Path,
    output: Path,
    start: Path | None,
    no_base: bool,
    base_model: str | None,
    template: str | None,
    **options: Any,
) -> None:
    """Compare a model with its base on a dataset.

    ARTIFACT is what a stage wrote, or a merged model, which has no base. Every answered turn of a record is a question.
    See docs/evaluation.md for how answers are scored.
    """
    refuse_results_in(output)
    # Report mistakes on the command line before importing anything heavy.
    settings = _evaluation_settings(options)
    artifact = open_model(artifact, base_model)
    quiet_libraries()
    from lora_llava.evaluation.run import Candidate, evaluate_candidate
    from lora_llava.system.hub.artifact import located

    console = make_console()
    candidate = Candidate(artifact, base_model, template, compare_base=not no_base, start=start and located(start))
    evaluate_candidate(candidate, settings, output, console)
    console.print(f"predictions, accuracies and samples are in {shown_path(output)}", soft_wrap=True)


def _evaluation_settings(options: Mapping[str, Any]) -> EvaluationSettings:
    """Turn the options into settings. Raises click.UsageError if they do not fit together."""
    from pydantic import ValidationError

    from lora_llava.recipe.settings import EvaluationSettings

    data = {key: options[key] for key in _DATA}
    others = {key: value for key, value in options.items() if key not in _DATA}
    lists = {"by": list(options["by"]), "base_questions": options["base_questions"] or None}
    try:
        return EvaluationSettings.model_validate({**others, **lists, "data": data})
    except ValidationError as error:
        raise click.UsageError(option_problems(error)) from error


def option_problems(error: ValidationError) -> str:
    """Return what is wrong with settings that options gave, a line each."""
    lines = []
    for details in error.errors():
        where = ".".join(map(str, details["loc"]))
        lines.append((f"--{where}: " if where else "") + details["msg"].removeprefix("Value error, "))
    return "\n".join(lines)
