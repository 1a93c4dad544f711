"""`Objective`: what the trainer asks of a loss; and `TokenLoss`, the objective of supervised fine-tuning."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from lora_llava.data.rows import Batch
from lora_llava.modeling.packed import packed_loss, packed_loss_by_token


class Objective(Protocol):
    """A loss that is a mean over items of an optimizer step, such as supervised tokens or pairs.

    Contract: with `num_items` of the whole step, over all its rows and ranks, the losses of its rows add up to that
    mean, however the step is cut into rows.
    """

    def count(self, row: Batch) -> int:
        """Count the items of a row."""

    def loss(self, model: Any, row: Batch, num_items: torch.Tensor | int) -> torch.Tensor:
        """Return the sum of the losses of a row's items divided by `num_items`, a scalar in fp32."""

    def loss_by_item(self, model: Any, row: Batch, num_items: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `loss`, to the bit, and the loss (N,) of each of the row's N items, detached and not divided."""


class TokenLoss:
    """The cross-entropy of the supervised tokens."""

    def count(self, row: Batch) -> int:
        """Count the supervised tokens of a row."""
        return row["shift_labels"].numel()

    def loss(self, model: Any, row: Batch, num_items: torch.Tensor | int) -> torch.Tensor:
        """Return the sum of a row's cross-entropies divided by `num_items`, a scalar in fp32."""
        return packed_loss(model, row, num_items)

    def loss_by_item(self, model: Any, row: Batch, num_items: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `loss`, and the cross-entropy of each supervised token."""
        return packed_loss_by_token(model, row, num_items)
