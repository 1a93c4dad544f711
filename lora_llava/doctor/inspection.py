"""One training record as the model gets it: its tokens, supervised or not, and the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Encoded
from lora_llava.conversation.templates import get_template
from lora_llava.data.images.read import open_image
from lora_llava.data.load import load_split
from lora_llava.data.record import Record
from lora_llava.data.rows import lay_out
from lora_llava.data.stage import EncodedRecords
from lora_llava.doctor.tokens import TokenKind, token_runs
from lora_llava.errors import DataError
from lora_llava.modeling.metadata import describe_base
from lora_llava.modeling.structure import image_tokens
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import StageName
from lora_llava.system.text import counted, printable, printable_lines

_STYLES: dict[TokenKind, str] = {"supervised": "bold green", "context": "default", "image": "cyan"}
_LINE_FEED = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
_PART = "\N{REPLACEMENT CHARACTER}"
_SHOWN = 200
"""Most characters of a value."""
_EDGE = "\N{LIGHT VERTICAL BAR}"


def inspect_record(recipe: Recipe, stage: str | None, index: int) -> Group:
    """Show training record `index` of a stage (None: the last one); reads the data and the tokenizer, not the model.

    Raises DataError if there is no such stage or record, or the record is unusable.
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
        image_tokens(config),
        max_length=settings.max_length,
    )
    return Group(
        Text(f"index {index}: {record.where}, stage {name}, template {settings.template}"),
        Text(),
        _token_view(encoded, tokenizer, int(config.image_token_id)),
        Text(),
        _legend(),
        Text(),
        _facts_view(encoded, record, int(config.vision_config.image_size)),
    )


def _legend() -> Text:
    """Explain the marks of `_token_view`."""
    return Text.assemble(
        ("«supervised»", _STYLES["supervised"]),
        "  ",
        ("context", _STYLES["context"]),
        "  ",
        (f"{IMAGE_PLACEHOLDER} x N: tokens of the image", _STYLES["image"]),
        f"  {_EDGE} between tokens",
    )


def _token_view(encoded: Encoded, tokenizer: Any, image_token_id: int) -> Text:
    """Show the tokens; supervised ones are also in guillemets, for screens without color."""
    view = Text()
    for kind, ids in token_runs(encoded, image_token_id):
        text = f"{IMAGE_PLACEHOLDER} x {len(ids)}" if kind == "image" else _EDGE.join(_token_texts(ids, tokenizer))
        view.append(f"«{text}»" if kind == "supervised" else text, _STYLES[kind])
    return view


def _token_texts(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text of each token, with visible line feeds; part of a character becomes a question mark."""
    shown = ""
    for end in range(1, len(ids) + 1):
        # Decode with the tokens before: alone, many tokenizers drop the leading space of a word.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        # Part of a character decodes to a mark, which the whole character then replaces.
        known = shown if text.startswith(shown) else shown.rstrip(_PART)
        shown = text
        yield printable_lines(text[len(known) :]).replace("\n", f"{_LINE_FEED}\n").replace(_PART, "?")


def _facts_view(encoded: Encoded, record: Record, image_size: int) -> Table:
    """Return the lengths of the record, and the shapes of the tensors of a row that holds only it."""
    table = Table(show_header=False)
    image = open_image(record.image) if record.image else None
    facts: dict[str, Any] = {
        "tokens": len(encoded.input_ids),
        "supervised": encoded.num_supervised,
        "prefix that conversations about the image share": encoded.prefix_length,
        "image": f"{image.width} x {image.height} pixels" if image else "none",
    }
    # What the data say beyond the turns.
    if record.image is not None:
        facts["image, in the data"] = printable(record.image.label, _SHOWN)
    if record.system is not None:
        facts["system prompt of the record"] = printable(record.system, _SHOWN)
    if record.references:
        facts["acceptable answers"] = printable(" | ".join(record.references), _SHOWN)
    if record.group is not None:
        facts["group"] = printable(record.group, _SHOWN)
    facts.update({name: f"{array.shape} {array.dtype}" for name, array in lay_out([[encoded]]).items()})
    if image:
        facts["pixel_values"] = f"(1, 3, {image_size}, {image_size}) float32"
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    return table
