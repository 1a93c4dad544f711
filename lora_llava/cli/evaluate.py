"""Commands that ask a trained model: eval and chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_llava.cli.common import make_console, quiet_libraries, refuse_model
from lora_llava.cli.options import base_option, template_option
from lora_llava.errors import DataError
from lora_llava.system.files import shown_path
from lora_llava.system.text import printable_lines

if TYPE_CHECKING:
    from lora_llava.generation.chat import Chat
    from lora_llava.recipe.settings import EvaluationSettings
    from lora_llava.recipe.stages import DataSettings

_EVALUATION = Path("evaluation")
_METRICS = ["auto", "exact_match", "vqa_v2", "token_f1"]
_PATH = click.Path(path_type=Path)
_LAST_WORDS = ("exit", "quit", "/exit", "/quit")


@click.command("eval")
@click.argument("artifact", type=_PATH)
@click.option(
    "--data",
    "path",
    required=True,
    help="LLaVA JSON or JSONL; or, with --columns, CSV, flat JSON, parquet, directory, hub id.",
)
@click.option("--image-root", help="Directory of the images [that of the data file].")
@click.option("--columns", help="Such as image=image,question=question,answer=answer.")
@click.option("--split", default="test", show_default=True, help="Split of a Hugging Face dataset.")
@click.option("--answer-prompt", help="Text after each question [that of the artifact's training].")
@click.option("--max-records", type=click.IntRange(min=1), help="Ask the first so many only.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Questions decoded at a time.",
)
@click.option("--metric", type=click.Choice(_METRICS), default="auto", show_default=True)
@click.option("--by", multiple=True, metavar="KEY", help="Accuracy by a key or column of the data too; repeatable.")
@click.option("--no-base", is_flag=True, help="Do not ask the base.")
@click.option(
    "--base-questions",
    type=click.IntRange(min=0),
    default=300,
    show_default=True,
    help="Questions to ask the base; 0: all.",
)
@click.option("--blind", type=click.IntRange(min=1), metavar="N", help="Ask N questions without their images too.")
@click.option("--start", type=_PATH, help="Artifact on the same base to compare with.")
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
    """Ask ARTIFACT and its base the questions of a data set.

    A merged model has no base. Every answered turn of a record is a question. What counts as right, and what the
    figures mean, is in docs/evaluation.md.
    """
    refuse_results_in(output)
    settings = evaluation_settings(options)  # A mistake on the command line shows before anything heavy is imported.
    refuse_model(artifact, base_model)
    quiet_libraries()
    from lora_llava.artifact import read_usage, template_to_ask
    from lora_llava.evaluation.questions import load_questions
    from lora_llava.evaluation.run import Candidate, as_trained, evaluate_artifact

    usage = read_usage(artifact, template)
    template_to_ask(usage, artifact)
    settings = as_trained(settings, usage)
    console = make_console()
    candidate = Candidate(artifact, base_model, template, compare_base=not no_base, start=start)
    questions = load_questions(settings.data, settings.by)
    evaluate_artifact(candidate, questions, settings, directory=output, console=console)
    console.print(f"predictions, accuracies and samples are in {shown_path(output)}", soft_wrap=True)


def evaluation_settings(options: Mapping[str, Any]) -> EvaluationSettings:
    """Make settings of the options of `eval`; click.UsageError if they do not fit together."""
    from lora_llava.recipe.settings import EvaluationSettings

    fields = {name: options[name] for name in ("path", "image_root", "split", "answer_prompt", "max_records")}
    return EvaluationSettings(
        data=data_settings({**fields, "columns": parse_columns(options["columns"])}),
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["max_rows"],
        metric=options["metric"],
        by=list(options["by"]),
        base_questions=options["base_questions"] or None,
        blind_questions=options["blind"],
    )


def refuse_results_in(output: Path) -> None:
    """Raise click.UsageError if the directory holds anything."""
    if output.exists() and not output.is_dir():
        raise click.UsageError(f"{output} is a file; give a directory with --output")
    if output.is_dir() and any(output.iterdir()):
        raise click.UsageError(f"{output} is not empty, and results are not overwritten; give another --output")


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Read `key=column,key=column`; click.UsageError if it is not of that form."""
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key.strip() and value.strip() for key, _, value in pairs):
        raise click.UsageError(f"--columns {text!r}: write it as image=COLUMN,question=COLUMN,answer=COLUMN")
    return {key.strip(): value.strip() for key, _, value in pairs}


def data_settings(fields: dict[str, Any]) -> DataSettings:
    """Check the options that say where records come from; click.UsageError if they do not fit together."""
    from pydantic import ValidationError

    from lora_llava.recipe.stages import DataSettings

    try:
        return DataSettings.model_validate(fields)
    except ValidationError as error:
        problems = [
            ".".join(["--data", *map(str, one["loc"])]) + ": " + one["msg"].removeprefix("Value error, ")
            for one in error.errors()
        ]
        raise click.UsageError("\n".join(problems)) from error


def one_image(_: click.Context, __: click.Parameter, images: tuple[Path, ...]) -> Path | None:
    """Return the image of `--image`; click.BadParameter if there are several."""
    if len(images) > 1:
        raise click.BadParameter(
            f"given {len(images)} times; LLaVA-1.5 is trained on one image in a conversation. Ask about one at a time."
        )
    for image in images:
        if image.is_dir():
            raise click.BadParameter(f"needs a file; {image} is a folder")
    return images[0] if images else None


@click.command()
@click.argument("artifact", type=_PATH)
@click.argument("question", required=False)
@click.option("--image", type=_PATH, multiple=True, callback=one_image, help="The image to talk about [none].")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@base_option
@template_option
def chat(
    artifact: Path,
    question: str | None,
    image: Path | None,
    max_new_tokens: int,
    base_model: str | None,
    template: str | None,
) -> None:
    """Ask ARTIFACT, or a merged model, about an image or without one.

    Without a QUESTION, talk until an empty line, or exit. Only answers go to stdout.
    """
    if not artifact.exists():
        raise click.BadParameter(f"{artifact} does not exist", param_hint="ARTIFACT")
    refuse_model(artifact, base_model)
    quiet_libraries()
    console = make_console(stderr=True)
    with console.status("loading the model"):
        from lora_llava.generation.chat import Chat

        conversation = Chat.open(artifact, image, base=base_model, template=template, max_new_tokens=max_new_tokens)
    if question is not None:
        _answer(conversation, question)
        return
    for one in questions():
        try:
            _answer(conversation, one)
        except DataError as error:
            if not sys.stdin.isatty():
                raise
            click.echo(printable_lines(f"Error: {error}"), err=True)


def _answer(conversation: Chat, question: str) -> None:
    """Ask, and write the answer to stdout while it grows."""
    conversation.ask(question, write_piece)
    click.echo()


def write_piece(text: str) -> None:
    """Write a piece of an answer; on a terminal, control characters other than line feeds are written out."""
    if sys.stdout.isatty():
        text = printable_lines(text)
    # Otherwise click drops some of the control characters where stdout is not a terminal.
    click.echo(text, nl=False, color=True)


def questions() -> Iterator[str]:
    """Yield lines of stdin up to an empty one, its end, or `exit`, with a prompt on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        click.echo("An empty line or exit ends the talk.", err=True)
    click.echo(prompt, nl=False, err=True)
    while (line := sys.stdin.readline().strip()) and line.lower() not in _LAST_WORDS:
        yield line
        click.echo(prompt, nl=False, err=True)
