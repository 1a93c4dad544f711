"""What the log says of a stage of pairs, and when it warns or stops."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_llava.errors import TrainingError
from lora_llava.training.checks.preference import PreferenceWatch
from lora_llava.training.objectives.preference import PairSums, PreferenceObjective, _sums, pair_losses
from tests.helpers.pairs import prefer_settings

REFERENCE = torch.tensor([[-10.0, -12.0]], dtype=torch.float64)


def watch_of(**settings: Any) -> PreferenceWatch:
    return PreferenceWatch(PreferenceObjective(prefer_settings(**settings)), torch.float32)


def step(watch: PreferenceWatch, number: int, log_probs: list[list[float]]) -> str | None:
    """Show a step with these log-probabilities; the reference of each pair is -10 and -12."""
    objective = watch.objective
    rows = torch.tensor(log_probs, dtype=torch.float64)
    objective._rows.append(_sums(objective.settings.beta, rows, REFERENCE.expand_as(rows)))
    completed: Any = SimpleNamespace(number=number, total=torch.tensor(0.5))
    return watch.on_step(completed)


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, math.log(2)), ({"loss": "hinge"}, 1.0), ({"loss": "ipo", "beta": 0.2}, 6.25)]
)
def test_the_loss_of_no_preference(settings: dict[str, Any], expected: float) -> None:
    made = prefer_settings(**settings)
    losses = pair_losses(made, REFERENCE, REFERENCE, torch.tensor([[3.0, 4.0]]))
    assert losses.tolist() == pytest.approx([expected])
    assert PreferenceObjective(made).start_loss == pytest.approx(expected)


def test_label_smoothing_of_swapped_answers() -> None:
    """With a smoothing of e, the loss is that of the pair with weight 1 - e and of the swapped one with weight e."""
    log_probs, lengths = torch.tensor([[-7.0, -13.0]], dtype=torch.float64), torch.ones(1, 2)
    smooth = pair_losses(prefer_settings(label_smoothing=0.3), log_probs, REFERENCE, lengths)
    own, swapped = (
        pair_losses(prefer_settings(), one, other, lengths)
        for one, other in ((log_probs, REFERENCE), (log_probs.flip(1), REFERENCE.flip(1)))
    )
    assert smooth.tolist() == pytest.approx((0.7 * own + 0.3 * swapped).tolist())


def test_the_log_has_means_over_the_pairs_since_its_last_line() -> None:
    watch = watch_of(beta=0.5)
    step(watch, 2, [[-8.0, -14.0], [-10.0, -12.0]])
    step(watch, 3, [[-12.0, -10.0]])
    model: Any = None
    row = watch.on_log(3, model, {"loss": 0.5})
    assert row == {
        "loss": 0.5,
        "reward_chosen": 0.0,
        "reward_rejected": 0.0,
        "reward_margin": 0.0,
        "reward_accuracy": pytest.approx(1 / 3),
        "log_prob_chosen": -10.0,
        "log_prob_rejected": -12.0,
    }
    step(watch, 4, [[-8.0, -14.0]])
    assert watch.on_log(4, model, {})["reward_margin"] == pytest.approx(2.0)
    assert watch.on_log(5, model, {"loss": 1.0}) == {"loss": 1.0}


def test_a_row_that_is_not_finite_is_left_out() -> None:
    watch = watch_of()
    step(watch, 2, [[math.nan, -14.0]])
    step(watch, 3, [[-8.0, -14.0]])
    assert watch.logged.pairs == 1


def test_the_sums_of_a_step_are_those_of_all_its_finite_rows() -> None:
    objective = PreferenceObjective(prefer_settings(beta=0.5))
    for row in ([[-9.5, -12.5], [-10.0, -12.0]], [[math.nan, -12.0]], [[-14.0, -12.0]]):
        log_probs = torch.tensor(row, dtype=torch.float64)
        objective._rows.append(_sums(0.5, log_probs, REFERENCE.expand_as(log_probs)))
    # Rewards of the three finite pairs: 0.25 and -0.25, 0 and 0, -2 and 0.
    assert objective.take_sums(torch.device("cpu")) == PairSums(3, -1.75, -0.25, 1, -33.5, -36.5, 2.5)
    assert objective.take_sums(torch.device("cpu")) == PairSums()
    # In fp64.
    objective._rows.append(torch.full((7,), 0.1, dtype=torch.float64))
    assert objective.take_sums(torch.device("cpu")).pairs == 0.1


def test_its_state_is_the_same_after_a_checkpoint() -> None:
    watch, resumed = watch_of(), watch_of()
    step(watch, 2, [[-8.0, -14.1]])
    resumed.restore(json.loads(json.dumps(watch.state())))
    assert (resumed.logged, resumed.recent, resumed.has_warned) == (watch.logged, watch.recent, False)
    resumed.restore(None)
    assert resumed.logged == PairSums()


@pytest.mark.fault("training: a preference stage whose first step is not at its reference")
def test_margins_at_the_first_step_stop_the_run() -> None:
    with pytest.raises(TrainingError, match=r"the loss is 0.5000, where margins of 0 would give 0.6931: .* by 0.5 a"):
        step(watch_of(), 1, [[-9.5, -12.0]])
    # Rounding is no margin, later steps have one, and with dropout the first one has.
    assert step(watch_of(), 1, [[-10.0001, -12.0]]) is None
    assert step(watch_of(), 2, [[-9.5, -12.0]]) is None
    watch = watch_of()
    watch.starts_at_zero = False
    assert step(watch, 1, [[-9.5, -12.0]]) is None


@pytest.mark.fault("training: chosen answers that become unlikely while the margin grows")
def test_falling_chosen_answers_are_warned_about_once() -> None:
    watch = watch_of()
    assert step(watch, 2, [[-13.0, -20.0]] * 63) is None
    warning = step(watch, 3, [[-13.0, -20.0]])
    assert warning is not None
    assert "was -10.0 at the start and is -13.0 now, means of 64 pairs" in warning
    assert step(watch, 4, [[-13.0, -20.0]] * 64) is None
    # By 5 % it is usual, and rising is what is meant.
    assert step(watch_of(), 2, [[-10.5, -20.0]] * 64) is None
    assert step(watch_of(), 2, [[-7.0, -20.0]] * 64) is None
