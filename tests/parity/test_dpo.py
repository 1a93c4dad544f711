"""Our packed loss of pairs against TRL's DPOTrainer, on the same ids, pixels and reference."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from trl.kernels import ChunkedLogProbFunction

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.modeling.attention import with_sdpa
from lora_llava.modeling.packed import llava_in
from lora_llava.training.objectives.preference import PreferenceObjective
from tests.helpers.pairs import TEXTS, log_probs_by_definition, padded, pair, prefer_settings, row_of_pairs
from tests.parity.test_packed import Gradients, build_model, error, gradients

CHANGES = torch.tensor([[1.0, -2.0], [-3.0, -1.0], [2.5, 1.5], [-4.0, -8.0]])
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


def by_trl(
    trainer: Any, pairs: list[Encoded], reference: torch.Tensor, dtype: torch.dtype, **settings: Any
) -> tuple[float, Gradients]:
    """Loss and gradients of TRL's trainer; it wants the images twice, for chosen and rejected."""
    for name, value in settings.items():
        setattr(trainer, name, value)
    batch = padded(pairs, dtype)
    batch["completion_mask"] = (batch.pop("labels") != IGNORE_INDEX).long()
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference.unbind(1)
    trainer.model.to(dtype).eval()
    with with_sdpa(llava_in(trainer.model)):
        loss = trainer.compute_loss(trainer.model, batch)
        computed = gradients(trainer.model, loss)
    return float(loss.detach()), {name: one for name, one in computed.items() if ".ref." not in name}


CASES = pytest.mark.parametrize(
    ("settings", "of_trl", "number"),
    [
        ({}, {"loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.1}, 4),
        ({"loss": "ipo", "beta": 0.3}, {"loss_types": ["ipo"], "loss_weights": [1.0], "beta": 0.3}, 4),
        ({"loss": "hinge", "beta": 0.2}, {"loss_types": ["hinge"], "loss_weights": [1.0], "beta": 0.2}, 4),
        # TRL's mean is over the tokens of all pairs, ours over those of each.
        ({"sft_weight": 0.7}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1}, 1),
    ],
    ids=["sigmoid", "ipo", "hinge", "sft"],
)


def assert_equal_trls(
    trainer: Any, settings: dict[str, Any], of_trl: dict[str, Any], number: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Compare both losses (relative, or absolute below 1) and the gradients of all weights together (relative)."""
    # An inverse of the number of pairs that fp32 holds, in which the loss is divided.
    pairs = [pair(*TEXTS[index]) for index in (0, 1, 3, 0)][:number]
    model = build_model(dtype)
    with torch.no_grad():
        reference = log_probs_by_definition(build_model(), pairs) - CHANGES[:number]
    theirs_loss, their_gradients = by_trl(trainer, pairs, reference, dtype, **of_trl)
    row = row_of_pairs(pairs, reference, dtype=dtype)
    loss = PreferenceObjective(prefer_settings(**settings)).loss(model, row, number)
    ours = gradients(model, loss)
    assert error(ours, their_gradients) < tolerance
    # The loss itself is handed on in fp32.
    assert float(loss.detach()) == pytest.approx(theirs_loss, rel=max(tolerance, 1e-7), abs=max(tolerance, 1e-7))
    # What TRL computes for the same step.
    assert row["input_ids"].numel() < 0.6 * padded(pairs)["input_ids"].numel()


def exact_log_probs(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, labels: torch.Tensor, *rest: Any) -> Any:
    """Log-probabilities of `labels` in the precision of the model; TRL's kernel computes them in fp32."""
    log_probs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return log_probs, *ChunkedLogProbFunction.apply(hidden.detach(), weight, bias, labels, *rest)[1:]


def exact_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm in the precision of its input; transformers' one computes in fp32."""
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


@CASES
def test_loss_and_gradients_equal_trls_to_the_precision_of_fp64(
    theirs: Any, settings: dict[str, Any], of_trl: dict[str, Any], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=exact_log_probs))
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    assert_equal_trls(theirs, settings, of_trl, number, torch.float64, 1e-12)


@CASES
def test_loss_and_gradients_equal_trls_in_fp32(
    theirs: Any, settings: dict[str, Any], of_trl: dict[str, Any], number: int
) -> None:
    """Of what fp64 computes, fp32 leaves TRL's gradients and ours 1.2e-6 each to rounding."""
    assert_equal_trls(theirs, settings, of_trl, number, torch.float32, 2e-6)
