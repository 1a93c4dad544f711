"""The packed forward pass: loss of a row of trees, equal to that of its conversations one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_llava.modeling.attention import attention_of, masked_inputs
from lora_llava.modeling.last_layer import only_where_predicted
from lora_llava.modeling.structure import HEAD_CHUNK, LANGUAGE_MODEL


def packed_hidden_states(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the last hidden states (S, hidden size) at the batch's `predict_positions`; see `data.batch.build_row`.

    The model is called as a whole, so that what wraps it (data parallelism) sees the call.
    """
    llava = llava_in(model)
    inputs = masked_inputs(batch, attention_of(llava), llava.get_input_embeddings().weight.dtype)
    last_layer = llava.get_submodule(LANGUAGE_MODEL).layers[-1]
    with _without_head(llava), only_where_predicted(last_layer, batch["predicting_places"]):
        outputs = model(
            **inputs,
            pixel_values=batch.get("pixel_values"),
            logits_to_keep=batch["predict_positions"],
            use_cache=False,
        )
    hidden_states: torch.Tensor = outputs.logits[0]
    return hidden_states


def packed_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the logits (S, vocabulary) at the batch's `predict_positions`."""
    return _head_logits(llava_in(model).lm_head, packed_hidden_states(model, batch))


def packed_loss(model: Any, batch: Mapping[str, torch.Tensor], num_supervised: torch.Tensor | int) -> torch.Tensor:
    """Sum of the cross-entropies of a row, in fp32, divided by `num_supervised`.

    Contract: `num_supervised` counts the supervised tokens of the whole optimizer step, over all its rows and
    ranks; so the sum over the rows is the mean over the step, however it is cut.
    """
    hidden_states = packed_hidden_states(model, batch)
    return _sum_of_losses(llava_in(model).lm_head, hidden_states, batch["shift_labels"]) / num_supervised


def _sum_of_losses(head: nn.Module, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Add up the cross-entropies chunk by chunk; of all but a single chunk the logits are computed again backwards."""

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(_head_logits(head, hidden).float(), targets, reduction="sum")

    if len(labels) <= HEAD_CHUNK:
        return of_chunk(hidden_states, labels)
    chunks = zip(hidden_states.split(HEAD_CHUNK), labels.split(HEAD_CHUNK), strict=True)
    losses: list[torch.Tensor] = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


def _head_logits(head: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    # Accelerate hands out what a model computed in bf16 as fp32; the head stands outside and goes on in its own.
    logits: torch.Tensor = head(hidden_states.to(head.weight.dtype))
    return logits


@contextmanager
def _without_head(llava: Any) -> Iterator[None]:
    """Let the model's forward pass end before its head: what it returns as logits are hidden states."""
    head = llava.lm_head
    llava.lm_head = nn.Identity()
    try:
        yield
    finally:
        llava.lm_head = head


def llava_in(model: Any) -> Any:
    """Take off what training wraps around the `LlavaForConditionalGeneration`: data parallelism, PEFT."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner
