"""Mix the sources of a stage: repeat or draw records by `weight` and `share`, as a function of data and seed alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from lora_llava.data.record import Record
from lora_llava.errors import DataError
from lora_llava.recipe.fields import data_name
from lora_llava.recipe.stages import DataSettings


def mixed(sources: Sequence[DataSettings], records: Sequence[list[Record]], seed: int) -> list[Record]:
    """Return the training records of an epoch, source by source, given those of each source.

    A record of a source with `weight` 2.5 is in it two times, and half of them a third time. The sources with a `share`
    are drawn, or repeated, so that they make up this fraction of all.
    """
    counts = [round(len(own) * (source.weight or 1.0)) for source, own in zip(sources, records, strict=True)]
    rest = sum(count for source, count in zip(sources, counts, strict=True) if source.share is None)
    total = rest / (1 - sum(source.share or 0.0 for source in sources))
    epoch: list[Record] = []
    for index, (source, own, count) in enumerate(zip(sources, records, counts, strict=True)):
        number = count if source.share is None else round(total * source.share)
        epoch += _repeated(own, max(1, number), f"mix/{seed}/{index}") if own else []
    return epoch


def _repeated(records: list[Record], count: int, seed: str) -> list[Record]:
    """Return `count` of the records: all of them as often as they fit, and a part of them once more."""
    times, left = divmod(count, len(records))
    drawn = sorted(random.Random(seed).sample(range(len(records)), left))
    return [*(records * times), *(records[index] for index in drawn)]


def split_leaks(
    train: Sequence[Record], validation: Sequence[Record]
) -> Iterator[tuple[Record, Record, Literal["image", "group"]]]:
    """Yield each image and group of validation records that another source trains on.

    Each with the first record that holds it out, and the first that is trained on.
    """
    # Of each source that trains on it, the first record with a key that is held out.
    trained: dict[str, dict[str, Record]] = {key: {} for record in validation for key in _keys(record)}
    for record in train:
        for key in _keys(record):
            if key in trained:
                trained[key].setdefault(record.source, record)
    for record in validation:
        for key in _keys(record):
            others = (other for source, other in trained.get(key, {}).items() if source != record.source)
            if (other := next(others, None)) is not None:
                del trained[key]
                yield record, other, "image" if key.startswith("image/") else "group"


def check_apart(train: Sequence[Record], validation: Sequence[Record]) -> None:
    """Raise DataError if an image or group of one source's training records is among another's validation records."""
    for record, other, kind in split_leaks(train, validation):
        what = "image" if kind == "image" else f"group {record.group!r:.80}"
        raise DataError(
            f"{record.where}: is held out for validation, but its {what} is trained on in {other.where}; "
            "leave it out of one source, or hold it out of both"
        )


def _keys(record: Record) -> list[str]:
    keys = [] if record.image is None else [f"image/{record.image.identity}"]
    return keys if record.group is None else [*keys, f"group/{record.group}"]


def source_names(sources: Sequence[DataSettings]) -> list[str]:
    """Return a name for each source: `source`, or that of its file or data set; a second one of it is `NAME (2)`."""
    given = {source.source for source in sources}
    names: list[str] = []
    for source in sources:
        own = source.source or data_name(source.path)
        numbered = (f"{own} ({number})" if number > 1 else own for number in itertools.count(1))
        free = (name for name in numbered if name not in names and name not in given)
        names.append(source.source or next(free))
    return names
