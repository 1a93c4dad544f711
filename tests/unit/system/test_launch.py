"""The processes of --gpus: who ends, with which code, and what is printed."""

from __future__ import annotations

import subprocess
import sys
from signal import SIGKILL, SIGTERM

import pytest
import torch
from click.testing import CliRunner

from lora_llava.cli import cli
from lora_llava.system import launch
from lora_llava.system.launch import _killed_line
from tests.helpers.processes import environment

START = "import sys; from lora_llava.system.launch import run_processes; sys.exit(run_processes(2, sys.argv[1:]))"


def test_an_error_of_all_processes_is_printed_once() -> None:
    launcher = {key: one for key, one in environment(0, 1, 0).items() if key not in ("RANK", "WORLD_SIZE")}
    launcher.pop("TORCHELASTIC_USE_AGENT_STORE")
    done = subprocess.run(
        [sys.executable, "-c", START, "finetune", "missing.yaml"], env=launcher, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: there is no recipe file missing.yaml")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ({1: 2}, None),
        # The launcher ends the others.
        ({0: -SIGTERM, 1: 2}, None),
        ({0: -SIGTERM}, "process 0 of 2 was ended by SIGTERM. The"),
        ({0: -SIGTERM, 1: -SIGKILL}, "process 1 of 2 was ended by SIGKILL, as the system does when memory runs out"),
        ({0: 1, 1: -SIGKILL}, "process 1 of 2 was ended by SIGKILL"),
    ],
)
def test_a_process_that_the_system_ended_is_named(codes: dict[int, int], words: str | None) -> None:
    line = _killed_line(codes, 2)
    assert line is None if words is None else line is not None and words in line


@pytest.mark.parametrize(("cards", "words"), [(0, "finds no GPUs"), (1, "finds 1 GPU on"), (2, "finds 2 GPUs")])
def test_more_processes_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch, cards: int, words: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    result = CliRunner().invoke(cli, ["finetune", "recipe.yaml", "--gpus", "3"])
    assert result.exit_code == 2
    assert words in result.stderr
    assert "torchrun --nproc-per-node 3 -m lora_llava finetune" in result.stderr


def test_each_card_gets_a_process_with_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, list[str]]] = []

    def run(count: int, arguments: list[str]) -> int:
        started.append((count, arguments))
        return 7

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "run_processes", run)
    arguments = ["finetune", "recipe.yaml", "--gpus", "2", "seed=1", "--debug"]
    assert CliRunner().invoke(cli, arguments).exit_code == 7
    assert started == [(2, ["--debug", "finetune", "recipe.yaml", "--gpus", "2", "seed=1"])]


@pytest.mark.parametrize("gpus", ["1", "3"])
def test_a_launcher_that_started_another_number_is_named(monkeypatch: pytest.MonkeyPatch, gpus: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    result = CliRunner().invoke(cli, ["finetune", "recipe.yaml", "--gpus", gpus])
    assert result.exit_code == 2
    assert f"--gpus {gpus}: 2 processes were started already; leave it out" in result.stderr
