"""Commands that ask a trained model: eval and chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_llava.cli.common import make_console, quiet_libraries
from lora_llava.files import shown_path

if TYPE_CHECKING:
    from lora_llava.recipe_stages import DataSettings

_EVALUATION = Path("evaluation")
_PATH = click.Path(path_type=Path)


@click.command("eval")
@click.argument("artifact", type=_PATH)
@click.option(
    "--data", "path", required=True, help="LLaVA JSON or JSONL; or parquet, directory, hub id with --columns."
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
@click.option("--no-base", is_flag=True, help="Do not ask the base, which takes half of the time.")
@click.option("--blind", type=click.IntRange(min=1), help="Ask so many questions without their images too.")
@click.option("--output", type=_PATH, default=_EVALUATION, show_default=True, help="Directory of the results.")
@click.option("--base", help="Directory of the base, if it is not where the artifact says.")
def evaluate(
    artifact: Path,
    path: str,
    image_root: str | None,
    columns: str | None,
    split: str,
    answer_prompt: str | None,
    max_records: int | None,
    max_new_tokens: int,
    max_rows: int,
    no_base: bool,
    blind: int | None,
    output: Path,
    base: str | None,
) -> None:
    """Ask ARTIFACT and its base the questions of a data set.

    A merged model has no base. An answer is right if it equals the reference after the normalisation of VQA v2.
    """
    refuse_results_in(output)
    fields = {
        "path": path,
        "image_root": image_root,
        "columns": parse_columns(columns),
        "split": split,
        "answer_prompt": answer_prompt,
        "max_records": max_records,
    }
    data_settings(fields)  # A mistake on the command line shows before anything heavy is imported.
    quiet_libraries()
    from lora_llava.artifact import read_usage
    from lora_llava.data.records import load_records
    from lora_llava.workflow import evaluate_artifact

    if answer_prompt is None:
        fields["answer_prompt"] = read_usage(artifact).answer_prompt
    console = make_console()
    evaluate_artifact(
        artifact,
        load_records(data_settings(fields)),
        directory=output,
        console=console,
        precision="auto",
        max_new_tokens=max_new_tokens,
        max_rows=max_rows,
        blind_questions=blind,
        compare_base=not no_base,
        base=base,
    )
    console.print(f"predictions, accuracies and samples are in {shown_path(output)}", soft_wrap=True)


def refuse_results_in(output: Path) -> None:
    """Raise click.UsageError if the directory holds anything."""
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

    from lora_llava.recipe_stages import DataSettings

    try:
        return DataSettings.model_validate(fields)
    except ValidationError as error:
        problems = [
            ".".join(["--data", *map(str, one["loc"])]) + ": " + one["msg"].removeprefix("Value error, ")
            for one in error.errors()
        ]
        raise click.UsageError("\n".join(problems)) from error


@click.command()
@click.argument("artifact", type=_PATH)
@click.argument("question", required=False)
@click.option("--image", type=_PATH, required=True, help="The image to talk about.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--base", help="Directory of the base, if it is not where the artifact says.")
def chat(artifact: Path, question: str | None, image: Path, max_new_tokens: int, base: str | None) -> None:
    """Ask ARTIFACT, or a merged model, about an image.

    Without a QUESTION, talk until an empty line. Only answers go to stdout.
    """
    quiet_libraries()
    from lora_llava.artifact import load_model
    from lora_llava.data.images import open_image
    from lora_llava.data.records import ImageSource
    from lora_llava.device import pick_device, pick_dtype
    from lora_llava.evaluation.chat import Chat

    source = ImageSource(str(image), image, None)
    open_image(source)
    device = pick_device()
    with make_console(stderr=True).status("loading the model"):
        loaded, usage = load_model(artifact, device=device, dtype=pick_dtype("auto", device), base=base)
    conversation = Chat(loaded, usage, source, max_new_tokens)
    for one in [question] if question is not None else questions():
        click.echo(conversation.ask(one))


def questions() -> Iterator[str]:
    """Yield lines of stdin up to an empty one, with a prompt on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        click.echo("An empty line ends the talk.", err=True)
    click.echo(prompt, nl=False, err=True)
    while line := sys.stdin.readline().strip():
        yield line
        click.echo(prompt, nl=False, err=True)
