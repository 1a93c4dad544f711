"""Our packed loss of pairs against TRL's DPOTrainer, on the same ids, pixels and reference."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.modeling.attention import with_sdpa
from lora_llava.modeling.packed import llava_in
from lora_llava.training.objectives.preference import PreferenceObjective
from tests.helpers.pairs import TEXTS, log_probs_by_definition, padded, pair, prefer_settings, row_of_pairs
from tests.parity.test_packed import Gradients, build_model, error, gradients

CHANGES = torch.tensor([[1.0, -2.0], [-3.0, -1.0], [2.5, 1.5]])
"""Of the log-probabilities since the reference, so that no margin is 0."""


@pytest.fixture(scope="module")
def theirs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer of a model; its data set is not read."""
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoProcessor

    image = Image.new("RGB", (40, 40))
    messages = {"prompt": "Is it red?", "chosen": "yes", "rejected": "no"}
    entry = {"images": [image]} | {
        key: [{"role": "user" if key == "prompt" else "assistant", "content": [{"type": "text", "text": text}]}]
        for key, text in messages.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, report_to="none", bf16=False, max_length=None
        )
        trainer = trl.DPOTrainer(
            model=build_model(),
            args=arguments,
            train_dataset=Dataset.from_list([entry]),
            processing_class=AutoProcessor.from_pretrained(tiny_base),
        )
    trainer.precompute_ref_logps = True
    return trainer


def by_trl(trainer: Any, pairs: list[Encoded], reference: torch.Tensor, **settings: Any) -> tuple[float, Gradients]:
    """Loss and gradients of TRL's trainer; it wants the images twice, for chosen and rejected."""
    for name, value in settings.items():
        setattr(trainer, name, value)
    batch = padded(pairs)
    batch["completion_mask"] = (batch.pop("labels") != IGNORE_INDEX).long()
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference.unbind(1)
    trainer.model.eval()
    with with_sdpa(llava_in(trainer.model)):
        loss = trainer.compute_loss(trainer.model, batch)
        found = gradients(trainer.model, loss)
    return float(loss.detach()), {name: one for name, one in found.items() if ".ref." not in name}


@pytest.mark.parametrize(
    ("settings", "of_trl", "number"),
    [
        ({}, {"loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.1}, 3),
        ({"loss": "ipo", "beta": 0.3}, {"loss_types": ["ipo"], "loss_weights": [1.0], "beta": 0.3}, 3),
        ({"loss": "hinge", "beta": 0.2}, {"loss_types": ["hinge"], "loss_weights": [1.0], "beta": 0.2}, 3),
        # TRL's mean is over the tokens of all pairs, ours over those of each.
        ({"sft_weight": 0.7}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1}, 1),
    ],
    ids=["sigmoid", "ipo", "hinge", "sft"],
)
def test_loss_and_gradients_equal_trls(
    theirs: Any, settings: dict[str, Any], of_trl: dict[str, Any], number: int
) -> None:
    pairs = [pair(*TEXTS[index]) for index in (0, 1, 3)][:number]
    model = build_model()
    with torch.no_grad():
        reference = log_probs_by_definition(model, pairs) - CHANGES[:number]
    theirs_loss, their_gradients = by_trl(theirs, pairs, reference, **of_trl)
    row = row_of_pairs(pairs, reference)
    loss = PreferenceObjective(prefer_settings(**settings)).loss(model, row, number)
    ours = gradients(model, loss)
    # Of log-probabilities of 200, which TRL adds up in fp32, a millionth is lost in rounding.
    assert float(loss.detach()) == pytest.approx(theirs_loss, abs=2e-6, rel=1e-6)
    assert error(ours, their_gradients) < 2e-6
    # What TRL computes for the same step.
    assert row["input_ids"].numel() < 0.6 * padded(pairs)["input_ids"].numel()
