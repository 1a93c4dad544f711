"""The command that evaluates a model: eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_llava.cli.common import make_console, open_model, quiet_libraries
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
)
from lora_llava.system.files import refuse_results_in, shown_path

if TYPE_CHECKING:
    from lora_llava.recipe.settings import EvaluationSettings

_EVALUATION = Path("evaluation")
_OF_ALL = ("columns", "encoding", "answer_prompt", "max_records")
"""Options that are settings of every source of the data."""


@click.command("eval")
@click.argument("artifact", type=PATH)
@click.option(
    "--data",
    "paths",
    multiple=True,
    required=True,
    help="LLaVA JSON or JSONL; or, with --columns, flat JSON, CSV, parquet, a directory or a Hub id; repeatable, with "
    "scores by source.",
)
@data_options(split="test", several=True)
@decoding_options
@metric_option
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
@click.option("--start", type=PATH, help="Another artifact on the same base to compare with.")
@click.option("--output", type=PATH, default=_EVALUATION, show_default=True, help="Directory of the results.")
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
    if no_base:
        refuse_unused("--no-base leaves the base out", "base_questions")
    # Report mistakes on the command line before importing anything heavy.
    settings = _evaluation_settings(options)
    artifact = open_model(artifact, base_model)
    quiet_libraries()
    from lora_llava.evaluation.run import Candidate, evaluate_candidate
    from lora_llava.run_directory.claim import is_artifact
    from lora_llava.system.hub.artifact import located

    if not is_artifact(artifact):
        refuse_unused(f"{artifact} is a whole model, which has no base to ask", "base_questions")
    console = make_console()
    candidate = Candidate(artifact, base_model, template, compare_base=not no_base, start=start and located(start))
    evaluate_candidate(candidate, settings, output, console)
    console.print(f"predictions, accuracies and samples are in {shown_path(output)}", soft_wrap=True)


def _evaluation_settings(options: Mapping[str, Any]) -> EvaluationSettings:
    """Turn the options into settings.

    Raises click.UsageError if they do not fit together, DataError if there are no such data.
    """
    from lora_llava.data.sources.missing import refuse_missing
    from lora_llava.recipe.settings import EvaluationSettings

    paths, roots = options["paths"], options["image_root"]
    if len(roots) not in (0, 1, len(paths)):
        raise click.UsageError(
            f"--image-root is given {len(roots)} times for {len(paths)} --data: give it once for all, or once for each"
        )
    refuse_split(options["split"], *paths)
    of_each = roots if len(roots) == len(paths) else (roots or (None,)) * len(paths)
    of_all = {key: options[key] for key in _OF_ALL}
    data = [
        {"path": path, "image_root": root, "split": split_of(path, options["split"], "test"), **of_all}
        for path, root in zip(paths, of_each, strict=True)
    ]
    others = {key: value for key, value in options.items() if key not in (*_OF_ALL, "paths", "image_root", "split")}
    others["batch_size"] = others.pop("max_rows")
    lists = {"by": list(options["by"]), "base_questions": options["base_questions"] or None}
    with settings_errors():
        settings = EvaluationSettings.model_validate({**others, **lists, "data": data})
    for source in settings.data.sources:
        refuse_missing(source)
    return settings
