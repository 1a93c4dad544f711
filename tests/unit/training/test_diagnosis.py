"""Warnings by cause, on curves: each names its own, once, and none is given of a sound stage."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from lora_llava.training.checks.diagnosis import (
    LossTrend,
    Validation,
    diagnose,
    has_fallen,
    read_validations,
)
from lora_llava.training.checks.monitor import StageMonitor

SAMPLES = (("red", "red"), ("yes", "no"), ("two", "two"))


def validation(step: int, loss: float, gain: float | None = 0.5, train: float = 1.0, **more: Any) -> Validation:
    blind = None if gain is None else loss + gain
    return Validation(step, loss, blind, gain, train, **{"samples": SAMPLES, **more})


def kinds(*validations: Validation, max_steps: int = 100) -> set[str]:
    return set(diagnose(validations, max_steps, keeps_best=True))


def diverged_at(losses: list[float], questions: int = 16) -> int | None:
    trend = LossTrend.over([questions] * len(losses))
    return next((step for step, loss in enumerate(losses, start=1) if trend.diverged(loss) is not None), None)


def test_k7_a_loss_that_leaves_its_course_is_seen_at_that_step() -> None:
    assert diverged_at([0.32, 0.30, 0.31, 5.4, 6.0]) == 4
    assert diverged_at([0.32, 5.4]) == 2
    falling = [6.0 - 0.1 * step for step in range(50)]
    assert diverged_at([*falling, 40.0]) == 51
    # Step by step, without a jump.
    assert diverged_at([*[0.3] * 20, *[0.3 + 0.05 * step for step in range(100)]]) is not None


def test_k7_one_hard_record_is_no_divergence() -> None:
    losses = [0.4, 0.3, 0.5] * 10
    # Of steps of one question the last eight count together.
    assert diverged_at([*losses, 6.0, 0.4, 0.3, 6.0, *losses], questions=1) is None
    assert diverged_at([*losses, *[6.0] * 8], questions=1) == 34
    assert diverged_at([0.3, 6.0, 0.3], questions=1) is None


@pytest.mark.parametrize("questions", [1, 4, 16, 128])
def test_k7_sound_curves_do_not_diverge(questions: int) -> None:
    rng = random.Random(questions)
    for _ in range(200):
        # A mean of exponential losses, as single answers have them, around a falling curve.
        curve = [0.2 + 3 / (1 + step / 20) for step in range(300)]
        losses = [level * sum(rng.expovariate(1) for _ in range(questions)) / questions for level in curve]
        assert diverged_at(losses, questions) is None, losses


def test_k7_divergence_is_told_once_and_goes_on_from_its_state() -> None:
    losses = [0.4, 0.3, 0.5, 0.4, 0.3, 0.4, 0.35, 4.0, 9.0, 0.3, 9.0]
    whole, parts = StageMonitor(), StageMonitor()
    found = [step for step, loss in enumerate(losses, start=1) if whole.see_loss(loss) is not None]
    again = []
    for step, loss in enumerate(losses, start=1):
        if parts.see_loss(loss) is not None:
            again.append(step)
        other = StageMonitor()
        other.restore(json.loads(json.dumps(parts.state())))
        parts = other
    assert found == again
    assert len(found) == 1


def test_k7_over_fitting_is_a_validation_loss_that_rises_while_training_falls() -> None:
    best = validation(70, 1.63, train=1.2)
    assert kinds(best, validation(80, 1.92, -0.19, train=0.9), max_steps=200) == {"over-fitting"}
    # Twice by little, or once by much.
    assert kinds(best, validation(80, 1.75, train=0.9)) == set()
    assert kinds(best, validation(80, 1.75, train=0.9), validation(90, 1.75, train=0.8)) == {"over-fitting"}
    # Where no step was taken before it, nothing is known of the training.
    assert kinds(replace(best, train_loss=None), validation(80, 1.92, train=0.9), max_steps=200) == set()
    assert kinds(best, replace(validation(80, 1.92), train_loss=None), max_steps=200) == set()
    # If training has risen too, it is something else.
    assert kinds(best, validation(80, 3.0, train=2.9)) == set()
    [text] = diagnose([best, validation(80, 1.92, train=0.9)], 200, keeps_best=False).values()
    assert text.startswith(
        "over-fitting: the validation loss rose from 1.6300 at step 70 to 1.9200, while the training loss fell from "
        "1.2000 to 0.9000. keep: best would keep step 70;"
    )


@pytest.mark.parametrize(
    ("step", "gain", "learned", "warned"),
    [
        (100, 0.0, True, True),
        (100, 0.009, True, True),
        (100, 0.011, True, False),
        # Images that hurt are looked at.
        (100, -0.2, True, False),
        # Nothing learned yet is another cause.
        (100, 0.0, False, False),
        # Early it may yet learn to.
        (99, 0.0, True, False),
        (49, 0.0, True, False),
    ],
)
def test_k7_not_looking_is_no_gain_at_the_end_though_the_loss_fell(
    step: int, gain: float, learned: bool, warned: bool
) -> None:
    assert kinds(validation(step, 1.0, gain, has_learned=learned)) == ({"not looking"} if warned else set())


def test_k7_not_looking_is_not_said_where_over_fitting_was() -> None:
    seen = [validation(70, 1.63, train=1.2), validation(100, 1.66, 0.001, train=0.9)]
    assert kinds(*seen) == {"not looking"}
    assert diagnose(seen, 100, keeps_best=True, known=["over-fitting"]) == {}
    assert diagnose(seen, 100, keeps_best=True, known=["diverged"]) == {}


def test_k7_not_looking_before_the_end_takes_three_validations_in_a_row() -> None:
    still = [validation(step, 1.0 - step / 1000, 0.001) for step in (30, 40, 50, 60, 70)]
    # Those of the first half do not count.
    assert kinds(*still[:4]) == set()
    assert kinds(*still) == {"not looking"}
    assert kinds(*still[:4], validation(70, 0.9, 0.04)) == set()


def test_k40_a_model_that_looks_late_is_not_accused() -> None:
    # Gains of a sound run: 0.4 % at step 32 of 64, 3.9 % at its end.
    gains = {8: -0.001, 16: 0.002, 24: 0.003, 32: 0.004, 40: 0.008, 48: 0.015, 56: 0.03, 64: 0.039}
    seen = []
    for step, gain in gains.items():
        seen.append(validation(step, 1.0, gain))
        assert kinds(*seen, max_steps=64) == set()


@pytest.mark.parametrize(
    ("samples", "warned"),
    [
        ([("red", "no"), ("yes", "no"), ("two", "no")], True),
        ([("red", ""), ("yes", ""), ("two", "")], True),
        # Right for more than half: nothing is known.
        ([("no", "No"), ("no", "No"), ("yes", "No")], False),
        ([("no", "no"), ("yes", "no"), ("no", "no"), ("yes", "no")], True),
        ([("red", "no"), ("yes", "no")], False),
        ([("red", "no"), ("yes", "no"), ("two", "yes")], False),
        ([], False),
    ],
)
def test_k7_collapsed_is_one_answer_to_different_questions(samples: Any, warned: bool) -> None:
    assert kinds(validation(100, 1.0, samples=tuple(samples))) == ({"collapsed"} if warned else set())
    assert kinds(validation(60, 1.0, samples=tuple(samples))) == set()
    thrice = [validation(step, 1.0, samples=tuple(samples)) for step in (60, 70, 80)]
    for some in (thrice[:2], thrice):
        assert kinds(*some) == ({"collapsed"} if warned else set())


def test_k7_validations_are_read_from_the_log() -> None:
    history = [
        {"step": 2, "loss": 4.0},
        {"step": 4, "warning": "something"},
        {"step": 5, "loss": 1.0},
        {"step": 5, "eval_loss": 2.0, "eval_loss_blind": 2.5, "image_gain": 0.4},
        {"step": 7, "loss": 0.5},
        {"step": 7, "samples": [], "warning": "left out"},
        {"step": 9, "eval_loss": 1.0, "samples": [{"question": "?", "answer": "a", "prediction": "b"}]},
    ]
    assert read_validations(history) == [
        Validation(5, 2.0, 2.5, 0.4, (2 * 4.0 + 3 * 1.0) / 5, True, ()),
        Validation(9, 1.0, None, None, 0.5, True, (("a", "b"),)),
    ]
    assert not has_fallen([1.0])
    assert not has_fallen([1.0, 0.91])
    assert has_fallen([1.0, 0.89])
