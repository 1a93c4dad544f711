"""One training record as the model sees it: its tokens, those it learns from marked, and the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_llava.conversation.encode import IGNORE_INDEX, IMAGE_PLACEHOLDER, Encoded, get_template
from lora_llava.data.encoded import EncodedRecords
from lora_llava.data.images.read import open_image
from lora_llava.data.layout import lay_out
from lora_llava.data.load import Record, load_split
from lora_llava.errors import DataError
from lora_llava.modeling.metadata import describe_base
from lora_llava.modeling.structure import num_image_tokens
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName
from lora_llava.system.text import counted, printable_lines

_LEARNT, _READ, _IMAGE = "bold green", "default", "cyan"
_LINE_FEED = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
_PART = "\N{REPLACEMENT CHARACTER}"
_EDGE = "\N{LIGHT VERTICAL BAR}"


def inspect_record(recipe: Recipe, stage: str | None, index: int) -> Group:
    """Show training record `index` of a stage (None: the last); of the base only the tokenizer is read.

    Raises DataError if there is no such record, or it cannot be trained on.
    """
    names = {str(name): name for name in recipe.stage_names}
    name: StageName = names[stage] if stage in names else recipe.stage_names[-1]
    if stage is not None and stage not in names:
        raise DataError(f"recipe {recipe.name} has no stage {stage}; it has {', '.join(names)}")
    settings = recipe.stage(name)
    records, _ = load_split(settings.data, recipe.seed)
    if index >= len(records):
        raise DataError(
            f"{settings.data.path}: there is no record {index}; it has {counted(len(records), 'record')}, from index 0"
        )
    record = records[index]
    config, tokenizer = describe_base(recipe.base)
    [encoded] = EncodedRecords(
        [record],
        get_template(settings.template, settings.system),
        tokenizer,
        image_token_id=int(config.image_token_id),
        num_image_tokens=num_image_tokens(config),
        max_length=settings.max_length,
    )
    return Group(
        Text(f"index {index}: {record.where}, stage {name}, template {settings.template}"),
        Text(),
        token_view(encoded, tokenizer, int(config.image_token_id)),
        Text(),
        legend(),
        Text(),
        facts_view(encoded, record, int(config.vision_config.image_size)),
    )


def legend() -> Text:
    """Explain the marks of `token_view`."""
    return Text.assemble(
        (
            "«learnt»",
            _LEARNT,
        ),
        "  ",
        ("only read", _READ),
        "  ",
        (f"{IMAGE_PLACEHOLDER} x N: tokens of the image", _IMAGE),
        f"  {_EDGE} between tokens",
    )


def token_view(encoded: Encoded, tokenizer: Any, image_token_id: int) -> Text:
    """Write out the tokens; runs that are learnt stand in guillemets too, for screens without colour."""
    view = Text()
    kinds = [
        "image" if token == image_token_id else "read" if label == IGNORE_INDEX else "learnt"
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
    ]
    place = 0
    for kind, run in groupby(kinds):
        count = len(list(run))
        ids = encoded.input_ids[place : place + count]
        if kind == "image":
            view.append(f"{IMAGE_PLACEHOLDER} x {count}", _IMAGE)
        else:
            text = _EDGE.join(token_texts(ids, tokenizer))
            view.append(*((f"«{text}»", _LEARNT) if kind == "learnt" else (text, _READ)))
        place += count
    return view


def token_texts(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text of each token, spaces kept, line feeds shown; a part of a character is a question mark."""
    shown = ""
    for end in range(1, len(ids) + 1):
        # Decoded with what is before: alone, many tokenizers take the space off a word.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        # A part of a character is shown as a mark, which the whole character then replaces.
        known = shown if text.startswith(shown) else shown.rstrip(_PART)
        shown = text
        yield printable_lines(text[len(known) :]).replace("\n", f"{_LINE_FEED}\n").replace(_PART, "?")


def facts_view(encoded: Encoded, record: Record, image_size: int) -> Table:
    """Lay out lengths, and the shapes of the tensors of a row with this record alone."""
    table = Table(show_header=False)
    image = open_image(record.image) if record.image else None
    facts: dict[str, Any] = {
        "tokens": len(encoded.input_ids),
        "learnt": encoded.num_supervised,
        "prefix that conversations on the image share": encoded.prefix_length,
        "image": f"{image.width} x {image.height} pixels" if image else "none",
    }
    facts.update(
        {name: f"{array.shape} {array.dtype}" for name, array in lay_out([[encoded]]).items() if name != "labels"}
    )
    if image:
        facts["pixel_values"] = f"(1, 3, {image_size}, {image_size}) float32"
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    return table
