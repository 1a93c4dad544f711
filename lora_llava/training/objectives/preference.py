"""The loss of preference pairs: DPO, IPO or hinge, of pairs packed as trees of two branches.

Shapes: P pairs of a row; in the last dimension of (P, 2), the chosen answer comes first.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch.nn import functional as F

from lora_llava.data.rows import Batch
from lora_llava.modeling.packed import answer_lengths, answer_log_probs
from lora_llava.recipe.stages import PreferSettings
from lora_llava.training.parallel.gradients import summed


@dataclass(frozen=True, slots=True)
class PairSums:
    """Sums over pairs, of which the log has means."""

    pairs: float = 0.0
    reward_chosen: float = 0.0
    """A reward is beta times the change of an answer's log-probability since the start of the stage."""
    reward_rejected: float = 0.0
    accuracy: float = 0.0
    """Pairs whose chosen answer has the higher reward."""
    log_prob_chosen: float = 0.0
    log_prob_rejected: float = 0.0
    margin_size: float = 0.0
    """Sum of absolute margins."""

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def means(self, prefix: str = "") -> dict[str, float]:
        """Return the means over the pairs under the names of the log; {} without pairs."""
        if not self.pairs:
            return {}
        margin = self.reward_chosen - self.reward_rejected
        sums = {
            "reward_chosen": self.reward_chosen,
            "reward_rejected": self.reward_rejected,
            "reward_margin": margin,
            "reward_accuracy": self.accuracy,
            "log_prob_chosen": self.log_prob_chosen,
            "log_prob_rejected": self.log_prob_rejected,
        }
        return {f"{prefix}{name}": value / self.pairs for name, value in sums.items()}


class PreferenceObjective:
    """The mean over pairs of the loss that the settings of stage `prefer` name."""

    def __init__(self, settings: PreferSettings) -> None:
        self.settings = settings
        self._rows: list[torch.Tensor] = []
        """`PairSums` of each row since they were last taken."""

    @property
    def start_loss(self) -> float:
        """The loss while all margins are 0, ln 2 with `sigmoid`; without the part of `sft_weight`."""
        if self.settings.loss == "hinge":
            return 1.0
        return 1 / (2 * self.settings.beta) ** 2 if self.settings.loss == "ipo" else math.log(2)

    def count(self, row: Batch) -> int:
        """Count the pairs of a row."""
        return len(row["tree_spans"])

    def loss(self, model: Any, row: Batch, num_items: torch.Tensor | int) -> torch.Tensor:
        """Return the sum of the losses of a row's pairs divided by `num_items`, a scalar in fp32."""
        return self.loss_by_item(model, row, num_items)[0]

    def loss_by_item(self, model: Any, row: Batch, num_items: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `loss`, and the loss of each pair."""
        log_probs, lengths = answer_log_probs(model, row), answer_lengths(row)
        losses = pair_losses(self.settings, log_probs, row["reference"], lengths)
        self._rows.append(_sums(self.settings.beta, log_probs.detach(), row["reference"]))
        return losses.sum().float() / num_items, losses.detach()

    def take_sums(self, device: torch.device) -> PairSums:
        """Return the sums over all rows since the last call, over all processes; rows that are not finite are left out.

        Every process must call it.
        """
        total = torch.zeros(len(fields(PairSums)), dtype=torch.float64, device=device)
        for sums in self._rows:
            total += torch.where(sums.isfinite().all(), sums, 0.0)
        self._rows.clear()
        return PairSums(*summed(total).tolist())


def pair_losses(
    settings: PreferSettings, log_probs: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Compute the loss (P,) of each pair from log-probabilities (P, 2) of its answers, by the model and its reference.

    `lengths` (P, 2): tokens of the answers. With the margin m = beta ((c - c0) - (r - r0)):

    - sigmoid: -log sigmoid(m), with label smoothing e: -(1 - e) log sigmoid(m) - e log sigmoid(-m)
    - hinge: max(0, 1 - m)
    - ipo: (d - 1 / (2 beta))^2, where d is the difference of the changes per token, as in TRL
    """
    changes, beta = log_probs - reference, settings.beta
    margins = beta * (changes[:, 0] - changes[:, 1])
    if settings.loss == "hinge":
        losses = F.relu(1 - margins)
    elif settings.loss == "ipo":
        per_token = changes / lengths
        losses = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)).square()
    else:
        smoothing = settings.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
    if settings.sft_weight:
        losses = losses - settings.sft_weight * log_probs[:, 0] / lengths[:, 0]
    return losses


def _sums(beta: float, log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the `PairSums` of a row as a tensor in fp64."""
    rewards = beta * (log_probs - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    columns = [
        torch.ones_like(margins),
        rewards[:, 0],
        rewards[:, 1],
        (margins > 0).double(),
        log_probs[:, 0],
        log_probs[:, 1],
        margins.abs(),
    ]
    return torch.stack(columns).sum(1)
