"""Runs of tokens of one kind: context, supervised, or of the image."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Literal

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded

TokenKind = Literal["context", "supervised", "image"]


def token_runs(encoded: Encoded, image_token_id: int) -> Iterator[tuple[TokenKind, list[int]]]:
    """Yield the token ids of a conversation in runs of one kind."""

    def kind(index: int) -> TokenKind:
        if encoded.input_ids[index] == image_token_id:
            return "image"
        return "context" if encoded.labels[index] == IGNORE_INDEX else "supervised"

    for name, indices in groupby(range(len(encoded.input_ids)), kind):
        yield name, [encoded.input_ids[index] for index in indices]
