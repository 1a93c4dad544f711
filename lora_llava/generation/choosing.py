"""Choose the next tokens of a batch: the most likely ones with their log-probabilities, or drawn ones.

Shapes: R rows of the batch that are not finished.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch


class Scored:
    """Takes the most likely tokens, as decoding does by itself, and adds up their log-probabilities.

    An instance is good for one batch.
    """

    def __init__(self) -> None:
        self.log_probabilities: dict[int, float] = defaultdict(float)
        """By the index of a row: natural logarithm of the probability of all its tokens, the end token included."""

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return the tokens, (R,), with the highest `logits`, (R, vocabulary)."""
        tokens = logits.argmax(-1)
        scores = torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0]
        for row, score in zip(rows, scores.tolist(), strict=True):
            self.log_probabilities[row] += score
        return tokens


class Sampled:
    """Draws tokens at a temperature, each row with a stream of random numbers.

    A row's stream depends on its seed alone, so its answer does not depend on the batch it is in, up to rounding.
    """

    def __init__(self, temperature: float, seeds: Sequence[str]) -> None:
        self.temperature = temperature
        self._streams = [random.Random(seed) for seed in seeds]

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return the tokens, (R,), drawn from softmax(`logits` / temperature), by inverting its distribution function.

        One random number a token; on the CPU, where sums are the same in every run.
        """
        cumulative = torch.softmax(logits.cpu().double() / self.temperature, -1).cumsum(-1)
        draws = torch.tensor([self._streams[row].random() for row in rows], dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0]
        return tokens.clamp(max=logits.shape[-1] - 1).to(logits.device)
