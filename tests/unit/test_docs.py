"""README and docs: links lead somewhere, every page is listed, and every command that is shown can be typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lora_llava.cli import cli

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchor_of(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def shown_commands(text: str) -> Iterator[str]:
    """Yield the lines of console blocks that start the command, continued lines joined."""
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if line.startswith("lora-llava "):
                yield line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = _HEADING.findall(path.read_text(encoding="utf-8"))
            assert anchor in [anchor_of(heading) for heading in headings], target


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([\w/]+\.md)\)", index))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= listed


def test_the_list_of_commands_is_complete() -> None:
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`lora-llava ([a-z]+)", page)) == set(cli.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_shown_command_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda *arguments: Path(arguments[1]))  # The files need not exist.
    for line in shown_commands(page.read_text(encoding="utf-8")):
        arguments = shlex.split(line.replace("FORMAT", "hf"), comments=True)[1:]
        command: click.Command = cli
        while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
            assert arguments[0] in command.commands, line
            command = command.commands[arguments.pop(0)]
        with command.make_context(command.name, arguments) as context:
            assert context.command is command, line


def test_commands_and_anchors_are_read_from_a_page() -> None:
    text = (
        "```console\n$ lora-llava predict m --data f \\\n  --output o.csv\nother tool\n```\nlora-llava not in a block\n"
    )
    assert list(shown_commands(text)) == ["lora-llava predict m --data f    --output o.csv"]
    assert anchor_of("Replay: general data, `a_b`") == "replay-general-data-a_b"
