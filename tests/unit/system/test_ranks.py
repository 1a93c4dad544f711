"""The processes of a run agree, end together, and report an error once."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava import errors
from lora_llava.errors import (
    DataError,
    LoraLlavaError,
    LostProcessError,
    ModelError,
    PreflightError,
    RecipeError,
    RunInterruptedError,
)
from lora_llava.system import ranks
from lora_llava.system.progress import phase
from tests.helpers.processes import run_together


def agree() -> None:
    """Print what this process agreed on with the others, by the name of the function."""
    seen: dict[str, Any] = {}

    @contextmanager
    def lock() -> Iterator[None]:
        seen["locked"] = True
        yield
        seen["unlocked"] = True

    def refuse() -> None:
        raise DataError("row 7 is broken", "image")

    with ranks.connected(), ranks.entered_by_first(lock):
        with ranks.connected():
            number = ranks.rank()
        seen["value"] = ranks.by_first(lambda: {"rank": ranks.rank()})
        seen["least"], seen["largest"] = ranks.least(10 - number), ranks.largest(number)
        seen["gathered"] = ranks.gathered((number, "x" * number))
        try:
            ranks.by_first(refuse)
        except DataError as error:
            seen["error"] = [str(error), error.kind]
            seen["reports"] = ranks.reports(error)
        print(json.dumps(seen))  # noqa: T201 - the test reads it


def lose(ending: str) -> None:
    """Have the second process end in one of three ways; print what the error of each says."""
    phase("Counting sheep")
    try:
        with ranks.connected():
            ranks.by_first(lambda: None)
            if ranks.rank() == 1 and ending == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if ranks.rank() == 1 and ending == "raised":
                raise DataError("row 7 is broken")
            if ranks.rank() == 1 and ending == "hung":
                time.sleep(6)
            torch.distributed.all_reduce(torch.zeros(1))
    except LoraLlavaError as error:
        print(type(error).__name__, ranks.reports(error), error)  # noqa: T201 - the test reads it


def test_all_processes_agree_with_the_first(tmp_path: Path) -> None:
    ended = run_together(tmp_path, agree, 3)
    assert [one.code for one in ended] == [0, 0, 0], ended
    seen = [json.loads(one.out) for one in ended]
    for one in seen:
        assert one["value"] == {"rank": 0}
        assert (one["least"], one["largest"]) == (8, 2)
        assert one["gathered"] == [[0, ""], [1, "x"], [2, "xx"]]
        assert one["error"] == ["row 7 is broken", "image"]
    # The error of all is reported by one; the lock is that of the first.
    assert sum(one["reports"] for one in seen) == 1
    assert [one.get("locked", False) for one in seen] == [True, False, False]


@pytest.mark.parametrize(
    ("ending", "shown", "words"),
    [
        ("killed", [(0, "LostProcessError")], "process 0 of 2: another process of the run ended"),
        ("raised", [(1, "DataError")], "row 7 is broken"),
        ("hung", [(0, "LostProcessError")], "did not answer in time; this one was at: Counting sheep"),
    ],
)
def test_a_lost_process_is_reported_once(tmp_path: Path, ending: str, shown: list[tuple[int, str]], words: str) -> None:
    ended = run_together(tmp_path, partial(lose, ending), 2, **{ranks.TIMEOUT: "3"})
    lines = [(number, one.out.split()[:2], one.out) for number, one in enumerate(ended) if one.out]
    reported = [(number, name, out) for number, (name, reports), out in lines if reports == "True"]
    assert [(number, name) for number, name, _ in reported[:1]] == shown, ended
    assert words in reported[0][2]
    assert len(reported) == 1


def test_a_single_process_agrees_with_itself() -> None:
    with ranks.connected():
        assert ranks.by_first(lambda: 3) == ranks.least(3) == ranks.largest(3) == 3
    assert ranks.gathered("a") == ["a"]
    assert ranks.is_first()
    assert (ranks.world_size(), ranks.local_world_size()) == (1, 1)


def test_variables_left_over_by_a_launcher_mean_nothing_in_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "2", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (ranks.rank(), ranks.local_rank(), ranks.local_world_size(), ranks.is_first()) == (0, 0, 1, True)


def test_a_plan_for_more_processes_starts_none() -> None:
    with ranks.planned_for(4), ranks.connected():
        assert (ranks.world_size(), ranks.rank(), ranks.least(3), ranks.by_first(lambda: 5)) == (4, 0, 3, 5)
    assert ranks.world_size() == 1


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraLlavaError)]
SPECIAL: dict[type, tuple[Any, ...]] = {PreflightError: (["two", "lines"],), RunInterruptedError: ("stopped", 15)}


@pytest.mark.parametrize(
    "error", [kind(*SPECIAL.get(kind, ("words",))) for kind in KINDS], ids=lambda one: str(type(one))
)
def test_errors_reach_other_processes_unchanged(error: Any) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy), copy.exit_code) == (
        type(error),
        str(error),
        vars(error),
        error.exit_code,
    )


def test_processes_on_one_card_are_refused() -> None:
    ranks._refuse_shared_cards([("a", "1"), ("a", "2"), ("b", "1")])
    with pytest.raises(ModelError, match="processes 1 and 2 share one card of a"):
        ranks._refuse_shared_cards([("b", "1"), ("a", "1"), ("a", "1")])


def test_a_process_without_a_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ModelError, match="has no card: it is number 1 on its machine"):
        ranks._check_card(1)


def test_what_cannot_be_sent_is_sent_as_text() -> None:
    error = ValueError(lambda: None)
    assert str(ranks._portable(error)).startswith("ValueError: <function")
    assert ranks._portable(LostProcessError("x")).args == ("x",)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "1e99"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv(ranks.TIMEOUT, raising=False)
    assert ranks._timeout().total_seconds() == 1800
    monkeypatch.setenv(ranks.TIMEOUT, "2.5")
    assert ranks._timeout().total_seconds() == 2.5
    monkeypatch.setenv(ranks.TIMEOUT, text)
    with pytest.raises(RecipeError, match=f"LORA_LLAVA_TIMEOUT is '{text}', must be a number of seconds above 0"):
        ranks._timeout()
