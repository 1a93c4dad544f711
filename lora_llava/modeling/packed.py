"""The packed forward pass: loss of a row of trees, equal to that of its conversations one by one.

Three mistakes here would train a wrong model without a word (relative error of the gradients measured on a small
random model): a bool mask with eager attention, which adds it (0.73); tree positions without a mask, from which
transformers guesses a packing of its own (1.08); the right mask with linear positions (0.044). So attention is
SDPA, and mask and positions are always given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F


def packed_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute the logits (S, vocabulary) at the batch's `predict_positions`; see `data.batch.build_row`."""
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        pixel_values=batch.get("pixel_values"),
        logits_to_keep=batch["predict_positions"],
        use_cache=False,
    )
    logits: torch.Tensor = outputs.logits[0]
    return logits


def packed_loss(model: Any, batch: Mapping[str, torch.Tensor], num_supervised: torch.Tensor | int) -> torch.Tensor:
    """Sum of the cross-entropies of a row, in fp32, divided by `num_supervised`.

    Contract: `num_supervised` counts the supervised tokens of the whole optimizer step, over all its rows and
    ranks; so the sum over the rows is the mean over the step, however it is cut.
    """
    logits = packed_logits(model, batch).float()
    return F.cross_entropy(logits, batch["shift_labels"], reduction="sum") / num_supervised


def check_attention(model: Any) -> None:
    """Refuse a model whose attention would read the mask wrongly."""
    attention = model.config.text_config._attn_implementation
    if attention != "sdpa":
        raise ValueError(f"packed rows need sdpa attention, the model has {attention!r}")
