"""Choose the next tokens of a batch: the most likely ones with their log-probabilities, or drawn ones.

Shapes: R rows of the batch, each with the answers to a prompt that begin alike and are not finished.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch


class Scored:
    """Takes the most likely tokens, as decoding does by itself, and adds up their log-probabilities.

    Use an instance for one batch only.
    """

    def __init__(self) -> None:
        self.log_probabilities: dict[int, float] = defaultdict(float)
        """By the index of an answer: natural logarithm of the probability of all its tokens, the end token included."""

    def __call__(self, logits: torch.Tensor, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the tokens with the highest `logits`, (R, vocabulary), for the answers of each row."""
        tokens = logits.argmax(-1)
        scores = torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0]
        for row, score in zip(rows, scores.tolist(), strict=True):
            for answer in row:
                self.log_probabilities[answer] += score
        return [[token] * len(row) for row, token in zip(rows, tokens.tolist(), strict=True)]


class Sampled:
    """Draws tokens at a temperature, each answer with a stream of random numbers.

    The stream of an answer depends on its seed alone, so it does not depend on the batch it is in, up to rounding.
    """

    def __init__(self, temperature: float, seeds: Sequence[str]) -> None:
        self.temperature = temperature
        self._streams = [random.Random(seed) for seed in seeds]

    def __call__(self, logits: torch.Tensor, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Draw from softmax(`logits` / temperature) for the answers of each row, by inverting the distribution.

        One random number a token; on the CPU, where sums are the same in every run.
        """
        cumulative = torch.softmax(logits.cpu().double() / self.temperature, -1).cumsum(-1)
        # (R, most answers of a row): the others of a row stay 0, and nothing is read for them.
        draws = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64)
        for number, row in enumerate(rows):
            draws[number, : len(row)] = torch.tensor(
                [self._streams[answer].random() for answer in row], dtype=torch.float64
            )
        drawn = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
        tokens = drawn.clamp(max=logits.shape[-1] - 1).tolist()
        return [drawn_for_row[: len(row)] for row, drawn_for_row in zip(rows, tokens, strict=True)]
