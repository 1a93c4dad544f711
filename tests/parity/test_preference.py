"""Pairs packed in rows, against both answers as padded sequences through the model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_llava.modeling.packed as packed_module
from lora_llava.conversation.encode import Encoded
from lora_llava.modeling.fused.layer import fuse_layers, has_fused_layers, layers_unfused
from lora_llava.training.objectives.preference import PreferenceObjective
from tests.helpers.layers import Layers, training_model
from tests.helpers.pairs import (
    TEXTS,
    log_probs_by_definition,
    loss_by_definition,
    padded,
    pair,
    prefer_settings,
    row_of_pairs,
)
from tests.parity.test_packed import Gradients, build_model, error, gradients

CHANGES = torch.tensor([[1.0, -2.0], [-3.0, -1.0], [2.5, 1.5], [-4.0, -8.0]])
"""Of the log-probabilities since the reference, so that no margin is 0."""
LOSSES: list[dict[str, Any]] = [
    {},
    {"beta": 0.5, "label_smoothing": 0.2},
    {"loss": "ipo", "beta": 0.3},
    {"loss": "hinge", "beta": 0.2},
    {"sft_weight": 0.7},
]
# Losses are made of log-probabilities of 200, of which fp32 leaves a millionth to rounding.
MULTI_TURN = ("<image>\nIs there a dog?", "no", "A cat?", "yes, a cat", "yes, a cat and a dog")


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model()


@pytest.fixture(scope="module")
def pairs() -> list[Encoded]:
    return [pair(*texts) for texts in TEXTS]


def reference_of(model: Any, pairs: list[Encoded]) -> torch.Tensor:
    with torch.no_grad():
        return log_probs_by_definition(model, pairs) - CHANGES[: len(pairs)]


def packed(model: Any, settings: Any, pairs: list[Encoded], rows: list[slice]) -> tuple[float, Gradients]:
    """Loss and gradients of a step of several rows."""
    objective, reference = PreferenceObjective(settings), reference_of(model, pairs)
    loss = torch.zeros(())
    for part in rows:
        row = row_of_pairs(pairs[part], reference[part], start=part.start)
        loss = loss + objective.loss(model, row, len(pairs))
    assert loss.dtype == torch.float32
    return float(loss.detach()), gradients(model, loss)


def by_definition(model: Any, settings: Any, pairs: list[Encoded]) -> tuple[float, Gradients]:
    loss = loss_by_definition(settings, log_probs_by_definition(model, pairs), reference_of(model, pairs), pairs)
    return float(loss.detach()), gradients(model, loss)


@pytest.mark.parametrize("settings", LOSSES, ids=str)
@pytest.mark.parametrize("rows", [[slice(0, 4)], [slice(0, 1), slice(1, 4)]], ids=["one row", "two rows"])
def test_a_packed_step_equals_padded_sequences(
    model: Any, pairs: list[Encoded], settings: dict[str, Any], rows: list[slice]
) -> None:
    ours_loss, ours = packed(model, prefer_settings(**settings), pairs, rows)
    theirs_loss, theirs = by_definition(model, prefer_settings(**settings), pairs)
    assert ours_loss == pytest.approx(theirs_loss, rel=1e-6, abs=2e-6)
    assert error(ours, theirs) < 2e-6
    assert min(float(one.abs().max()) for one in theirs.values()) > 0


def test_only_the_last_answer_of_a_longer_conversation_counts(model: Any) -> None:
    longer = [pair(*MULTI_TURN)]
    settings = prefer_settings(loss="ipo", sft_weight=0.3)
    ours_loss, ours = packed(model, settings, longer, [slice(0, 1)])
    theirs_loss, theirs = by_definition(model, settings, longer)
    assert ours_loss == pytest.approx(theirs_loss, rel=1e-6, abs=2e-6)
    assert error(ours, theirs) < 2e-6
    [alone] = [pair(MULTI_TURN[0], *MULTI_TURN[3:])]
    assert [one.num_supervised for one in longer[0].branches] == [one.num_supervised for one in alone.branches]


def test_the_head_in_chunks_changes_nothing(model: Any, pairs: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    whole_loss, whole = packed(model, prefer_settings(), pairs, [slice(0, 4)])
    monkeypatch.setattr(packed_module, "HEAD_CHUNK", 7)
    loss, chunked = packed(model, prefer_settings(), pairs, [slice(0, 4)])
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert error(chunked, whole) < 1e-6


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT's layers", "fused layers"])
@pytest.mark.parametrize("rows", [[slice(0, 4)], [slice(0, 1), slice(1, 4)]], ids=["one row", "two rows"])
def test_a_packed_step_over_an_nf4_base_equals_padded_sequences(
    pairs: list[Encoded], rows: list[slice], fused: bool
) -> None:
    """As in training with QLoRA; the padded sequences go through the layers of PEFT and bitsandbytes."""
    model, settings = training_model(Layers()), prefer_settings(beta=0.5, label_smoothing=0.1, sft_weight=0.3)
    if fused:
        assert fuse_layers(model) is None
    ours_loss, ours = packed(model, settings, pairs, rows)
    assert has_fused_layers(model) == fused
    with layers_unfused(model):
        theirs_loss, theirs = by_definition(model, settings, pairs)
    assert ours_loss == pytest.approx(theirs_loss, rel=1e-6, abs=2e-6)
    assert error(ours, theirs) < 2e-6
    assert min(float(one.abs().max()) for one in theirs.values()) > 0
    # What NF4 rounds is far more than that.
    unquantized = training_model(Layers(quantization="none"))
    assert error(packed(unquantized, settings, pairs, rows)[1], theirs) > 1e-2


def test_a_pair_takes_fewer_tokens_than_its_padded_answers(pairs: list[Encoded]) -> None:
    computed = row_of_pairs(pairs, CHANGES)["input_ids"].numel()
    separate = sum(len(branch.input_ids) for one in pairs for branch in one.branches)
    shared = sum(one.prefix_length for one in pairs)
    assert computed == separate - shared
    assert computed < 0.6 * padded(pairs)["input_ids"].numel()
    # The common beginning of two answers is computed once, and counts for both.
    [dog, *_] = pairs
    assert dog.prefix_length > dog.labels.count(-100)
