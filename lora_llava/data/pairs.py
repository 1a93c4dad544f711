"""Preference pairs: a record with a chosen and a rejected answer as two conversations that share a prefix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile
from typing import Any

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded, Turn, encode, encode_prompt
from lora_llava.data.record import Record
from lora_llava.errors import DataError

_KIND = "pair"


def encode_record(record: Record, *, pairs: bool, **settings: Any) -> Encoded:
    """Encode the conversation of a record, or with `pairs` both; `settings` are those of `encode`.

    Raises DataError as `encode` does.
    """
    settings["system"] = record.system
    return encode_pair(record, **settings) if pairs else encode(record.turns, where=record.where, **settings)


def encode_pair(record: Record, *, max_length: int, **settings: Any) -> Encoded:
    """Encode both conversations of a pair, each cut off after `max_length` tokens; `settings` are those of `encode`.

    Only the last answer is supervised. The shared prefix reaches to where the answers part. Raises DataError as
    `encode` does, if the record has no rejected answer, and if the answers do not differ within `max_length`.
    """
    where, rejected_text = record.where, record.rejected
    if rejected_text is None:
        raise DataError(
            f"{where}: rejected: is missing, or no text; stage prefer trains on pairs: give the worse answer, name its "
            "column (columns.rejected), or remove the record",
            _KIND,
        )
    if record.turns[-1:] and record.turns[-1].text.strip() == rejected_text.strip():
        raise DataError(f"{where}: rejected: equals the chosen answer; write a worse one, or remove the record", _KIND)
    chosen = encode(record.turns, where=where, max_length=max_length, **settings)
    turns = [*record.turns[:-1], Turn("assistant", rejected_text)]
    rejected = encode(turns, where=f"{where}: rejected", max_length=max_length, **settings)
    if chosen.input_ids == rejected.input_ids:
        raise DataError(
            f"{where}: rejected: equals the chosen answer within max_length {max_length}; raise max_length, or remove "
            "the record",
            _KIND,
        )
    if len(record.turns) > 2:
        prompt = encode_prompt(record.turns[:-1], where=where, **settings)
        chosen, rejected = (_supervised_from(len(prompt.input_ids), answered) for answered in (chosen, rejected))
    shared = _shared_length(chosen, rejected)
    return replace(
        chosen,
        prefix_length=shared,
        is_cut=chosen.is_cut or rejected.is_cut,
        rejected=replace(rejected, prefix_length=shared),
    )


def _supervised_from(start: int, encoded: Encoded) -> Encoded:
    """Supervise only the tokens from index `start` on: the last answer."""
    return replace(encoded, labels=[IGNORE_INDEX] * start + encoded.labels[start:])


def _shared_length(one: Encoded, other: Encoded) -> int:
    """Count the tokens that two conversations start with."""
    pairs = zip(one.input_ids, other.input_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def rejected_fingerprint(records: Iterable[Record]) -> str:
    """Return the sha256 (hexadecimal) of the rejected answers, in order; `data.load.fingerprint` has the rest."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.rejected).encode() + b"\n")
    return digest.hexdigest()
