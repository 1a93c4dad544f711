"""The records of a stage as ids: counted once, before the run, and encoded anew whenever one is needed.

Held as lists, the ids of a large data set would take many times the memory of its texts; encoding one conversation
takes a fraction of a millisecond.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, overload

from lora_llava.conversation.encode import Encoded, Turn, encode
from lora_llava.conversation.templates import Template, Tokenizer
from lora_llava.data.load import Record
from lora_llava.data.packing import PlanItem
from lora_llava.system.progress import counting

Encode = Callable[..., Encoded]
"""`conversation.encode` with all but the turns and their place settled."""


class Size(NamedTuple):
    """What is kept of an encoded conversation."""

    length: int
    prefix_length: int
    num_supervised: int
    is_cut: bool


def size_of(encoded: Encoded) -> Size:
    """Count a conversation."""
    return Size(len(encoded.input_ids), encoded.prefix_length, encoded.num_supervised, encoded.is_cut)


class EncodedRecords(Sequence[Encoded]):
    """The encoded conversations of `records`, in their order.

    Making it encodes every record once, unless their `sizes` are known already; DataError names the first that
    cannot be trained on.
    """

    def __init__(
        self,
        records: Sequence[Record],
        template: Template,
        tokenizer: Tokenizer,
        *,
        image_token_id: int,
        num_image_tokens: int,
        max_length: int,
        sizes: Iterable[Size] | None = None,
    ) -> None:
        self.records = records
        self._encode: Encode = partial(
            encode,
            template=template,
            tokenizer=tokenizer,
            image_token_id=image_token_id,
            num_image_tokens=num_image_tokens,
            max_length=max_length,
        )
        self.items: list[PlanItem] = []
        """Each conversation as the planner sees it; those of one image have one group number."""
        self.num_supervised = array("l")
        """Targets of the loss in each conversation."""
        self.num_cut = 0
        """Conversations that `max_length` cut short."""
        numbers: dict[str, int] = {}
        for record, one in zip(records, self._sizes() if sizes is None else sizes, strict=True):
            group = -1 if record.image is None else numbers.setdefault(record.image.key, len(numbers))
            self.items.append(PlanItem(one.length, one.prefix_length, group))
            self.num_supervised.append(one.num_supervised)
            self.num_cut += one.is_cut

    def _sizes(self) -> Iterator[Size]:
        with counting("encoding conversations", len(self.records)) as advance:
            for encoded in self:
                yield size_of(encoded)
                advance(1)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self._of(record) for record in self.records[index]]
        return self._of(self.records[index])

    def __iter__(self) -> Iterator[Encoded]:
        return map(self._of, self.records)

    def _of(self, record: Record) -> Encoded:
        turns: Sequence[Turn] = record.turns
        return self._encode(turns, where=record.where)
