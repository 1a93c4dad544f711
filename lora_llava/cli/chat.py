"""The command that asks interactively: chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_llava.cli.common import make_console, open_model, quiet_libraries
from lora_llava.cli.options import PATH, base_option, template_option
from lora_llava.errors import DataError
from lora_llava.system.names import path_hint
from lora_llava.system.text import printable_lines

if TYPE_CHECKING:
    from lora_llava.generation.chat import Chat

_LAST_WORDS = ("exit", "quit", "/exit", "/quit")


def _single_image(_: click.Context, __: click.Parameter, images: tuple[Path, ...]) -> Path | None:
    """Return the image of `--image`. Raises click.BadParameter if there are several, or for a directory."""
    if len(images) > 1:
        raise click.BadParameter(
            f"given {len(images)} times; LLaVA-1.5 is trained on one image per conversation. Ask about one at a time."
        )
    for image in images:
        if image.is_dir():
            raise click.BadParameter(f"needs a file; {image} is a folder")
    return images[0] if images else None


@click.command()
@click.argument("artifact", type=PATH)
@click.argument("question", required=False)
@click.option("--image", type=PATH, multiple=True, callback=_single_image, help="Image to ask about [none].")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Maximum tokens per answer."
)
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
    """Chat with a model, about an image or without one.

    ARTIFACT is what a stage wrote, or a merged model: a directory, or USER/REPO[@REVISION] on the Hub. Without a
    QUESTION, the chat continues until an empty line or `exit`. Only answers go to stdout.
    """
    if question is None and sys.stdin is None:
        raise click.UsageError("stdin is closed, so no question can be read from it; give a QUESTION")
    artifact = open_model(artifact, base_model)
    if image is not None and not image.exists():
        raise DataError(f"--image {image} does not exist. {path_hint(image)}")
    quiet_libraries()
    console = make_console(stderr=True)
    with console.status("loading the model"):
        from lora_llava.generation.chat import Chat

        conversation = Chat.open(artifact, image, base=base_model, template=template, max_new_tokens=max_new_tokens)
    if question is not None:
        _answer(conversation, question)
        return
    for typed in _questions():
        try:
            _answer(conversation, typed)
        except DataError as error:
            if not sys.stdin.isatty():
                raise
            click.echo(printable_lines(f"Error: {error}"), err=True)


def _answer(conversation: Chat, question: str) -> None:
    """Ask a question and stream the answer to stdout."""
    conversation.ask(question, write_piece)
    click.echo()


def write_piece(text: str) -> None:
    """Write a piece of an answer; on a terminal, escape control characters other than line feeds."""
    if sys.stdout.isatty():
        text = printable_lines(text)
    # Without color=True, click drops some control characters when stdout is not a terminal.
    click.echo(text, nl=False, color=True)


def _questions() -> Iterator[str]:
    """Yield lines of stdin until an empty one, end of file, or `exit`; prompt on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        click.echo("An empty line or exit ends the chat.", err=True)
    click.echo(prompt, nl=False, err=True)
    while (line := sys.stdin.readline().strip()) and line.lower() not in _LAST_WORDS:
        yield line
        click.echo(prompt, nl=False, err=True)
