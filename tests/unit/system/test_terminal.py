"""What reaches the terminal: no control character of data, names or answers, and no line of a library."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_llava.cli import cli
from lora_llava.system.console import PlainConsole
from lora_llava.system.text import printable, printable_lines
from lora_llava.training.log import TrainingLog, sample_line
from tests.helpers.faulty import encoded, entry, scene, sound_data, write_recipe

HOSTILE = "\x1b]0;owned\x07\x1b[31m[red]x[/red] :smile:\u202e\x9b2J"
SHOWN = r"\e]0;owned\x07\e[31m[red]x[/red] :smile:\u202e\x9b2J"


def safe(text: str) -> bool:
    return text == printable_lines(text)


def printed(console: PlainConsole, *parts: Any) -> str:
    with console.capture() as capture:
        console.print(*parts)
    return capture.get()


@pytest.mark.parametrize("wrap", [str, Text, lambda text: Text.assemble(("> ", "bold"), text)])
def test_k29_the_console_shows_what_it_is_given_and_obeys_nothing(wrap: Any) -> None:
    output = printed(PlainConsole(width=200), wrap("a " + HOSTILE + "\nb"))
    # rich itself drops the bell.
    assert SHOWN.replace(r"\x07", "") in output.replace(r"\x07", "")
    assert output.endswith("\nb\n")
    assert safe(output)


def test_k29_tables_show_markup_in_titles_and_cells() -> None:
    table = Table(HOSTILE, title="[red]t[/red]")
    table.add_row("[bold]cell[/bold]")
    output = printed(PlainConsole(width=200), table)
    assert safe(output)
    for words in ("[red]t[/red]", "[bold]cell[/bold]", "[red]x[/red]"):
        assert words in output


def test_k29_colors_of_the_kit_are_kept_on_a_terminal() -> None:
    console = PlainConsole(width=80)
    console._force_terminal = True
    console._color_system = None
    assert safe(printed(console, Text("red", style="bold red"), HOSTILE).replace("\x1b[1m", "").replace("\x1b[0m", ""))


def test_k29_a_sample_answer_is_one_line() -> None:
    line = sample_line({"question": "Q\nq", "prediction": f"a\r\nb {HOSTILE}", "answer": "x\ty"}).plain
    assert line == rf"  Q\nq -> a\r\nb {SHOWN} (true: x\ty)"
    assert "(nothing)" in sample_line({"question": "Q", "prediction": " ", "answer": "a"}).plain
    assert len(sample_line({"question": "Q" * 999, "prediction": "", "answer": ""}).plain) < 300


def test_k29_samples_and_warnings_of_the_log_are_shown_raw_on_any_console(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    log = TrainingLog("instruct", tmp_path / "log.jsonl", [], console)
    sample = {"question": "[red]Q[/red]", "prediction": "x\ny", "answer": "\x1b[2J"}
    log._show({"step": 0, "warning": f"file {HOSTILE}", "eval_loss": 1.0, "samples": [sample]})
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert safe(output)
    assert r"  [red]Q[/red] -> x\ny (true: \e[2J)" in output
    assert SHOWN in output


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


@pytest.fixture
def hostile(tiny_base: Path, tmp_path: Path) -> Path:
    """A recipe over data with escapes in ids, names of images, questions, answers and groups."""
    images, train, tested = sound_data()
    name = "\x1b[31m[red]\n.png"
    images[name] = encoded(scene(80))
    train.insert(0, entry(f"id{HOSTILE}", name, f"What{HOSTILE}?", f"an answer{HOSTILE}", f"p{HOSTILE}"))
    train.append(entry("bad", f"gone{HOSTILE}.png", "Q", "A"))
    train.append(entry(f"empty{HOSTILE}", name, "Q", " "))
    tested.append(entry("leak", name, "Q", f"b{HOSTILE}", f"p{HOSTILE}"))
    return write_recipe(tmp_path, tiny_base, images, train, tested, group="patient")


def test_k29_check_inspect_and_errors_write_escapes_out(hostile: Path, tmp_path: Path) -> None:
    result = run("check", str(hostile), "--workers", "1", "--output", str(tmp_path / "ck[red]x"))
    assert result.exit_code == 1
    assert safe(result.output)
    assert "ck[red]x" in result.output.replace("\n", "")
    result = run("check", str(hostile), "--workers", "1")
    lists = hostile.parent / "run" / "check" / "bad_records" / "instruct.jsonl"
    result = run("inspect", str(hostile), f"stages.instruct.data.exclude={lists}")
    assert result.exit_code == 0, result.output
    assert safe(result.output)
    assert r"\e" in result.output
    result = run("inspect", str(hostile))
    assert result.exit_code == 1
    assert safe(result.output)
    result = run("inspect", "\x1b[2J.yaml")
    assert result.exit_code == 2
    assert safe(result.output)


def test_k29_text_is_cut_and_written_out() -> None:
    assert printable("abcdef", 4) == "abc\N{HORIZONTAL ELLIPSIS}"
    assert printable_lines("a\tb\nc\x1b") == "a\\tb\nc\\e"


SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
import lora_llava.training.run, lora_llava.shipping.merge.run, lora_llava.shipping.export
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("something else")
logging.getLogger("mine").warning("my own")
"""


def test_k30_a_script_that_imports_the_kit_sees_its_own_lines_alone() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line]
    assert lines == ["WARNING:bitsandbytes.backends.cpu.ops:something else", "WARNING:mine:my own"]


def test_k30_with_debug_the_lines_of_libraries_are_shown() -> None:
    from lora_llava.system.quiet import ADVICE, hold_back_advice, show_advice

    code = "import logging, sys; from lora_llava.system.quiet import show_advice; show_advice(); "
    code += "logging.basicConfig(stream=sys.stdout); import bitsandbytes"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "kernels-community" in result.stdout
    assert ADVICE
    show_advice()
    hold_back_advice()
