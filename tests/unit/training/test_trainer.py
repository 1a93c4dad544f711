"""What a step of the training loop takes and reports, against its conversations one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lora_llava.training.trainer import PackedTrainer
from tests.helpers.steps import IN_A_STEP, made_rows, made_trainer
from tests.parity.test_packed import Gradients, branches, build_model, error, separate

STEPS = 3


class Watch(TrainerCallback):
    """Copies the gradients before each optimizer step, and lists the events."""

    def __init__(self) -> None:
        self.gradients: list[Gradients] = []
        self.events: list[str] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Copy the gradients."""
        named = model.named_parameters()
        self.gradients.append({name: one.grad.clone() for name, one in named if one.grad is not None})


def watched(directory: Path, **settings: Any) -> tuple[PackedTrainer, Watch]:
    """A trainer of three steps that does not move the weights unless `settings` say so."""
    still = {"learning_rate": 0.0, "max_grad_norm": 0.0}
    trainer = made_trainer(directory, made_rows(range(STEPS)), **{**still, **settings})
    trainer.mm_projector_lr = None
    watch = Watch()
    trainer.callbacks.append(watch)
    return trainer, watch


def of_step(step: int) -> tuple[torch.Tensor, Gradients]:
    """Loss and gradients of a step's conversations, each alone; the first step has images 0 and 1."""
    start = IN_A_STEP * step
    encoded = branches(IN_A_STEP * (step + 1))[start:]
    return separate(build_model(), [encoded[:2], encoded[2:]])


@pytest.mark.fault("training: gradient accumulation that changes the loss")
def test_k32_a_step_takes_the_gradient_of_the_mean_over_its_tokens(tmp_path: Path) -> None:
    trainer, watch = watched(tmp_path)
    trainer.train()
    lines = [row for row in trainer.state.log_history if "loss" in row]
    assert (len(watch.gradients), len(lines)) == (STEPS, STEPS)
    loss, expected = of_step(0)
    assert error(watch.gradients[0], expected) < 1e-5
    assert lines[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    norm = sum(float(one.square().sum()) for one in expected.values()) ** 0.5
    assert lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
