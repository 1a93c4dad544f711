"""A conversion that is stopped leaves nothing that could be taken for a whole one, and works when started again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_llava.cli import cli
from lora_llava.system.files import STAGING
from tests.helpers.published_sets import coco_captions

SLOW = """
import sys, time
from lora_llava.data.convert import writer
add = writer.Writer.write
def slow(self, *args, **kwargs):
    add(self, *args, **kwargs)
    print("written", flush=True)
    time.sleep(60)
writer.Writer.write = slow
from lora_llava.cli import cli
cli(sys.argv[1:])
"""
"""A conversion that waits after its first record, by when its image is there."""


def convert(directory: Path) -> list[str]:
    return ["convert", "coco", str(directory / "data"), str(directory / "new" / "parts")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_conversion_leaves_nothing_that_looks_whole(tmp_path: Path, number: signal.Signals) -> None:
    coco_captions(tmp_path / "data")
    output = tmp_path / "new" / "parts"
    command = [sys.executable, "-c", SLOW, *convert(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "written" not in (line := process.stdout.readline()):
            assert line, "it ended before its first record"
        assert any((tmp_path / "new").rglob("images/*")), "work has begun"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode in (130, -number)
    assert "Traceback" not in said
    # Of a killed process the unfinished output stays, under a name that no command reads; the next one removes it.
    assert not output.exists()
    left = list(tmp_path.glob("new/*"))
    assert all(path.name.startswith(STAGING) for path in left)
    assert (number == signal.SIGKILL) == bool(left) or number == signal.SIGTERM
    done = CliRunner().invoke(cli, convert(tmp_path))
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["parts"]
