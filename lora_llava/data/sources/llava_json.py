"""Load LLaVA's data format, JSON or JSON Lines with `id`, `image` and `conversations`, and its variants.

Variants have `messages` of role and content instead of `conversations`, or `images`, a list of one, instead of `image`.
Preference data also have `rejected`, a worse last answer; stages other than `prefer` ignore it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from lora_llava.data.bad_records import BadRecords
from lora_llava.data.images.root import ImageRoot
from lora_llava.data.record import (
    Record,
    check_group,
    check_placeholder,
    check_text,
    own_values,
    with_answer_prompt,
)
from lora_llava.data.sources.cells import ImageCells, join_images, kind_of, place_image, read_dialog, read_question
from lora_llava.data.sources.columns import load_columns
from lora_llava.data.sources.forms import CONVERSATIONS, describe_record, known_form
from lora_llava.data.sources.mapping import make_reader
from lora_llava.data.sources.missing import refuse_missing
from lora_llava.data.sources.selection import Entry
from lora_llava.data.sources.tables import read_entries, read_records
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.text import printable

_KEYS = frozenset({"id", "image", "images", "system", *CONVERSATIONS})


def load_llava_json(
    data: DataSettings, image_root: Path | None, bad: BadRecords, *, extra: bool = False
) -> list[Record]:
    """Load the records of a `.json` or `.jsonl` file; `image_root` defaults to its directory.

    `extra`: also keep other keys. Raises DataError naming file, record and field, unless `bad` collects it.
    """
    refuse_missing(data)
    path = Path(data.path)
    root = ImageRoot(image_root or path.parent, "image", data, at_once=bad.collects)
    images = ImageCells(root)

    def read(entry: Entry, number: int) -> Record:
        record = _record(entry, number, f"{path.name}, record {number}", images, data)
        return replace(record, extra=own_values(entry.value, _KEYS)) if extra else record

    entries = read_entries(path, data.records, data.encoding)
    first = next(entries, None)
    if first is not None and _is_flat(first.value):
        return load_columns(data, image_root, bad, extra=extra)
    records = read_records(() if first is None else chain([first], entries), read, data, bad, _identity)
    root.check()
    return records


def _is_flat(entry: Any) -> bool:
    """Tell whether an entry is of another form that its keys identify."""
    is_llava = isinstance(entry, dict) and any(entry.get(key) is not None for key in CONVERSATIONS)
    return isinstance(entry, dict) and not is_llava and known_form(entry) is not None


def _identity(entry: Any) -> str | None:
    """Return the id of an entry as text; None if it has no usable one."""
    given = entry.get("id") if isinstance(entry, dict) else None
    if given is None or isinstance(given, bool) or not isinstance(given, str | int):
        return None
    text = str(given)
    return text if text.encode("utf-8", "replace").decode("utf-8") == text else None


def _record(entry: Entry, number: int, location: str, images: ImageCells, data: DataSettings) -> Record:
    record, details = entry.value, [entry.spot] if entry.spot else []
    if not isinstance(record, dict):
        suffix = f" ({entry.spot})" if entry.spot else ""
        raise DataError(f"{location}{suffix}: is {kind_of(record)}, must be an object with id, image and conversations")
    given = record.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise DataError(f"{location}: id: is {kind_of(given)}, must be text or an integer")
    if given is not None:
        details.append(f"id {printable(check_text(str(given), f'{location}: id'), 80)}")
    where = f"{location} ({', '.join(details)})" if details else location
    key = next((key for key in CONVERSATIONS if record.get(key) is not None), None)
    if key is None:
        raise DataError(f"{where}: conversations: is missing; {describe_record(record)}", "form")
    dialog = read_dialog(record[key], f"{where}: {key}")
    own = record.get("images") if record.get("image") is None else record["image"]
    image = images.source(join_images(own, dialog.images), where)
    if record.get("objects") and any("<bbox>" in turn.text for turn in dialog.turns):
        raise DataError(
            f"{where}: objects: <bbox> stands for boxes that are not in the text; write them out, such as "
            "[0.10, 0.20, 0.35, 0.60]"
        )
    # LLaVA's own form must have the placeholder; in the variants it is optional.
    turns = place_image(dialog.turns) if image is not None and key == "messages" else dialog.turns
    check_placeholder(turns, image, f"{where}: {key}")
    group = None
    if data.group is not None:
        group = check_group(make_reader(data.group, "group")(record, where), f"{where}: {data.group}")
    identity = str(number) if given is None else str(given)
    prompted = with_answer_prompt(turns, data.answer_prompt)
    system = dialog.system if (own_system := record.get("system")) in (None, "") else own_system
    if system is not None:
        system = read_question(system, f"{where}: system")
    rejected = check_text(value, f"{where}: rejected") if isinstance(value := record.get("rejected"), str) else None
    return Record(identity, image, prompted, where, number, group, dialog.references, system, rejected=rejected)
