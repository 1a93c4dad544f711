"""The figures logged with the loss, and the warnings: each once, and none in a sound run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_llava.data.stage import StepCounts
from lora_llava.training.checks.monitor import StageMonitor, projector_norms
from tests.helpers.steps import made_rows, made_trainer
from tests.parity.test_packed import build_model

COUNTS = [StepCounts(4, 20, 100)] * 40
LOGS = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3}


def warnings_of(watch: StageMonitor, norms: list[dict[str, float]]) -> list[str]:
    """What is warned of in a stage with these gradient norms, each step logged."""
    model, found = build_model(), []
    for step, one in enumerate(norms, start=1):
        watch.see_step(step, one)
        row = watch.on_log(step, model, LOGS)
        found += [row["warning"]] if "warning" in row else []
    return found


def steady(steps: int, lora: float = 1.0) -> list[dict[str, float]]:
    return [{"lora": lora + step % 3, "projector": 0.1} for step in range(steps)]


def test_a_steady_stage_has_no_warning() -> None:
    assert warnings_of(StageMonitor(COUNTS), [*steady(20), {"lora": 15.0, "projector": 0.9}, *steady(19)]) == []


@pytest.mark.fault("training: an exploding gradient")
def test_a_gradient_far_above_its_median_is_warned_of_once() -> None:
    norms = [*steady(12), {"lora": 100.0, "projector": 0.1}, *steady(3), {"lora": 100.0, "projector": 0.1}]
    [warning] = warnings_of(StageMonitor(COUNTS, max_grad_norm=0.5), norms)
    assert warning.startswith(
        "step 13: the gradient norm of lora, 100, is 50 times its median of the last 12 steps, 2. "
    )
    assert "max_grad_norm 0.5" in warning


def test_the_first_steps_are_compared_with_nothing() -> None:
    assert warnings_of(StageMonitor(COUNTS), [*steady(9), {"lora": 1e4, "projector": 0.1}]) == []


def test_a_group_without_gradients_is_warned_of_and_a_step_of_texts_is_not() -> None:
    texts = {"lora": 1.0, "projector": 0.0}
    assert warnings_of(StageMonitor(COUNTS), [*steady(3), *[texts] * 4, *steady(3), *[texts] * 4]) == []
    [warning] = warnings_of(StageMonitor(COUNTS), [*steady(3), *[texts] * 20])
    assert warning.startswith("step 8: no gradient has reached projector for 5 steps")


def test_the_share_of_supervised_tokens_is_that_of_the_steps_since_the_last_line() -> None:
    watch, model = StageMonitor([StepCounts(1, 10, 100), StepCounts(1, 30, 100), StepCounts(1, 1, 5000)]), build_model()
    assert watch.on_log(2, model, LOGS)["supervised_share"] == pytest.approx(0.2)
    row = watch.on_log(3, model, LOGS)
    assert row["supervised_share"] == pytest.approx(0.0002)
    assert "only 0.02% are supervised" in row["warning"]


def test_norms_of_the_projector() -> None:
    model = build_model()
    wrapper = model.get_base_model().model.multi_modal_projector
    old = torch.cat([one.flatten() for one in wrapper.original_module.parameters()])
    assert projector_norms(model) == (pytest.approx(float(old.norm())), pytest.approx(float(old.norm())), 0.0)
    with torch.no_grad():
        for parameter in wrapper.modules_to_save["default"].parameters():
            parameter.mul_(12)
    watch = StageMonitor(COUNTS)
    row = watch.on_log(1, model, LOGS)
    assert row["projector_norm"] == pytest.approx(12 * float(old.norm()), rel=1e-5)
    assert row["projector_change"] == pytest.approx(11, rel=1e-5)
    assert "the projector's norm went from" in row["warning"]
    assert "warning" not in watch.on_log(2, model, LOGS)


def test_logged_norms_are_those_of_the_gradients(tmp_path: Path) -> None:
    trainer = made_trainer(tmp_path, made_rows(), max_grad_norm=1e-3)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 6
    for row in rows:
        # Both are before clipping, and the groups hold all that is trained.
        together = (row["grad_norm_lora"] ** 2 + row["grad_norm_projector"] ** 2) ** 0.5
        assert together == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["grad_norm"] > 0.01
    changes = [row["projector_change"] for row in rows]
    assert changes == sorted(changes)
    assert changes[0] > 0


def test_a_watch_goes_on_from_its_state() -> None:
    norms = [*steady(12), {"lora": 100.0, "projector": 0.1}, *steady(6)]
    model, whole, first = build_model(), StageMonitor(COUNTS), StageMonitor(COUNTS)
    rows = []
    for step, one in enumerate(norms, start=1):
        whole.see_step(step, one)
        if step % 4 == 0:
            rows.append(whole.on_log(step, model, LOGS))
    again = []
    for step, one in enumerate(norms, start=1):
        first.see_step(step, one)
        if step % 4 == 0:
            again.append(first.on_log(step, model, LOGS))
        second = StageMonitor(COUNTS)
        second.restore(json.loads(json.dumps(first.state())))
        first = second
    assert again == rows
    assert sum("warning" in row for row in rows) == 1


def test_k40_a_projector_that_starts_at_zero_is_not_accused() -> None:
    model = build_model()
    wrapper = model.get_base_model().model.multi_modal_projector
    with torch.no_grad():
        for parameter in wrapper.original_module.parameters():
            parameter.zero_()
        for parameter in wrapper.modules_to_save["default"].parameters():
            parameter.fill_(1e-4)
    row = StageMonitor(COUNTS).on_log(1, model, LOGS)
    assert row["projector_norm"] == pytest.approx(0.006, rel=0.5)
    # Of nothing there is no share.
    assert row.keys().isdisjoint({"warning", "projector_change"})


def test_k40_no_gradient_names_what_its_group_needs() -> None:
    [projector] = warnings_of(StageMonitor(COUNTS), [{"lora": 1.0, "projector": 0.0}] * 20)
    assert "no record with an image was in them" in projector
    [lora] = warnings_of(StageMonitor(COUNTS), [{"lora": 0.0, "projector": 1.0}] * 20)
    assert "no gradient has reached lora for 5 steps" in lora
    assert "no supervised token was in them, or the base does not use the layers that LoRA adapts" in lora
    assert "image" not in lora
