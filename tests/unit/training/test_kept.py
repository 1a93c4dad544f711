"""Which step is kept, what is said of it, and when patience is lost."""

from __future__ import annotations

from typing import Any

import pytest

from lora_llava.training.checkpoints.kept import choose_kept, has_lost_patience


def history(*losses: float) -> list[dict[str, Any]]:
    """A log with a training loss and a validation every ten steps."""
    rows: list[dict[str, Any]] = []
    for number, loss in enumerate(losses, start=1):
        rows += [{"step": 10 * number, "loss": loss / 10}, {"step": 10 * number, "eval_loss": loss, "image_gain": 0.5}]
    return rows


def test_k6_the_best_is_kept_and_both_are_said() -> None:
    kept = choose_kept(history(3.0, 1.63, 1.8, 1.92), 40, "best")
    assert kept.step == 20
    assert kept.metrics == {
        "train_loss": pytest.approx(0.163), "eval_loss": 1.63, "image_gain": 0.5,
        "best_step": 20, "best_eval_loss": 1.63, "last_step": 40, "last_eval_loss": 1.92,
    }  # fmt: skip
    assert str(kept) == "best validation loss 1.6300 at step 20, last 1.9200 at step 40; kept: step 20, the best"


def test_k6_the_last_is_kept_and_both_are_said() -> None:
    kept = choose_kept(history(3.0, 1.63, 1.8, 1.92), 40, "last")
    assert (kept.step, kept.metrics["eval_loss"], kept.metrics["best_eval_loss"]) == (40, 1.92, 1.63)
    assert str(kept) == "best validation loss 1.6300 at step 20, last 1.9200 at step 40; kept: step 40, the last"


def test_k6_the_first_of_equals_and_the_last_if_it_is_the_best() -> None:
    assert choose_kept(history(2.0, 1.0, 1.0), 30, "best").step == 20
    kept = choose_kept(history(2.0, 1.5, 1.0), 30, "best")
    assert kept.step == 30
    assert str(kept) == "best validation loss 1.0000 at the last step, 30, which is kept"


def test_k6_without_validations_the_last_is_kept() -> None:
    kept = choose_kept([{"step": 7, "loss": 2.0}], 8, "best")
    assert (kept.step, kept.metrics) == (8, {"train_loss": 2.0})
    assert str(kept) == "kept: step 8, the last; no validation loss was measured"
    assert choose_kept([], 8, "best").metrics == {}


@pytest.mark.parametrize(
    ("losses", "lost_at"),
    [
        ((3.0, 2.0, 2.1, 2.2), {1, 2}),
        ((3.0, 2.0, 2.0), {1}),
        ((3.0, 2.0, 1.0), set()),
        ((1.0, 2.0, 0.9), set()),
        ((), set()),
    ],
)
def test_k6_patience_counts_validations_since_the_best(losses: tuple[float, ...], lost_at: set[int]) -> None:
    assert {patience for patience in (1, 2, 3) if has_lost_patience(history(*losses), patience)} == lost_at
    assert not has_lost_patience(history(*losses), None)
