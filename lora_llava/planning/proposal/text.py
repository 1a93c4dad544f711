"""Write a commented recipe for data that were looked at."""

from __future__ import annotations

import math
import os
import re
import shlex
import statistics
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_llava.data.images.read import DEEP_GRAY, FORMATS
from lora_llava.data.record import Record
from lora_llava.planning.proposal.look import Look
from lora_llava.recipe.file import one_line
from lora_llava.system.text import counted, printable

_PATHS = ("path", "image_root")
_SHORT = "Answer the question using a single word or phrase."
"""How LLaVA-1.5 was asked for short answers."""
_SHORT_WORDS = 3
"""Maximum number of words of the median answer for which it is asked."""
_MIN_STEPS, _MAX_EPOCHS = 150, 10
"""A LoRA hardly learns in fewer optimizer steps, and memorizes small data in more epochs."""
_MAX_OPENED = 500
"""Maximum number of images that are opened to see what they are."""


def recipe_text(look: Look, output: Path, base_model: str) -> str:
    """Return the recipe as text; paths are relative to the directory of `output`."""
    letters = unicodedata.normalize("NFKD", look.name).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9_-]+", "_", letters).strip("_-") or "data"
    number = len(look.records)
    images = {record.image.identity for record in look.records if record.image is not None}
    start = output.resolve().parent
    rank = 32 if number < 1_000 else 64 if number < 10_000 else 128
    lines = [
        f"# {printable(_capital(look.form))}: {counted(number, 'record')} on {counted(len(images), 'image')}.",
        *(f"# {printable(note)}" for note in look.notes),
        "#",
        *(f"#   lora-llava {command}" for command in _commands(output)),
        "version: 1",
        f"name: {one_line(name)}",
        "base:",
        f"  model_name_or_path: {one_line(base_model)}",
        "quantization:",
        "  type: nf4",
        *_image_lines(look.records),
        "adapter:",
        "  # More data can use a higher rank; with few records it would only memorize them sooner.",
        f"  r: {rank}",
        f"  lora_alpha: {2 * rank}",
        "stages:",
        "  instruct:",
        *_data_lines(look, start),
        *_size_lines(number if "validation" in look.data else round(number * (1 - _share(number)))),
    ]
    if look.test is not None:
        lines += ["evaluation:", "  data:", *_settings(_relative(look.test, start), "    ")]
        lines += _prompt_lines(look.records, "    ", comment=False)
    return "\n".join(lines) + "\n"


def _commands(output: Path) -> list[str]:
    """Return the commands to run with the recipe, as they are typed in a shell."""
    name = printable(shlex.quote(os.path.relpath(output)))
    return [f"check {name}", f"finetune {name} --dry-run", f"finetune {name}"]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _data_lines(look: Look, start: Path) -> list[str]:
    """Return the section `data` of the stage."""
    data = _relative(look.data, start)
    group, validation = data.pop("group", None), data.pop("validation", None)
    lines = ["    data:", *_settings(data, "      "), *_prompt_lines(look.records, "      ", comment=True)]
    if group is not None:
        lines += [
            "      # Records of one value are never on both sides of the split.",
            f"      group: {one_line(group)}",
        ]
    else:
        lines.append(
            "      # Is there a column such as patient or device? With group: COLUMN it is never on both sides."
        )
    if validation is None:
        lines += [
            "      # By whole images, and groups if there are any.",
            f"      validation: {{share: {_share(len(look.records)):g}}}",
        ]
    else:
        lines += [f"      validation: {one_line(_relative(validation, start))}"]
    if look.unusable:
        lines += [
            f"      # {counted(len(look.unusable), 'record')} cannot be read; the first: "
            f"{printable(look.unusable[0], 200)}. lora-llava check lists all. To leave them out:",
            "      # on_bad_record: skip",
            f"      # max_bad_records: {len(look.unusable)}",
        ]
    return lines


def _share(number: int) -> float:
    """Return the share of records to hold out: about 500 of many."""
    return max(0.02, min(0.2, round(500 / number, 2)))


def _prompt_lines(records: Sequence[Record], indent: str, *, comment: bool) -> list[str]:
    """Return `answer_prompt`, if the answers are short and the questions do not ask for that."""
    answers = [record.turns[-1].text for record in records]
    words = statistics.median(len(answer.split()) for answer in answers)
    asked = sum(_SHORT.lower() in record.turns[0].text.lower() for record in records)
    if words > _SHORT_WORDS or asked:
        return []
    reason = (
        f"{indent}# Half of the answers have at most {counted(words, 'word')}; LLaVA-1.5 asks for such in these words."
    )
    return [*([reason] if comment else []), f"{indent}answer_prompt: {_SHORT}"]


def _size_lines(number: int) -> list[str]:
    """Return batch size and epochs for a number of training records."""
    batch_size = 8 if number < 200 else 16 if number < 4_000 else 32 if number < 20_000 else 128
    epochs = min(_MAX_EPOCHS, max(3 if number < 5_000 else 1, math.ceil(_MIN_STEPS * batch_size / number)))
    steps = max(1, number // batch_size) * epochs
    few = f" Fewer than {_MIN_STEPS} may be too few to learn: more records help." if steps < _MIN_STEPS else ""
    return [
        f"    # About {counted(steps, 'optimizer step')}.{few}",
        f"    num_train_epochs: {epochs}",
        f"    batch_size: {batch_size}",
    ]


def _image_lines(records: Sequence[Record]) -> list[str]:
    """Return the section `images`, if there are images of more than 8 bits among the first."""
    sources = list({record.image.identity: record.image for record in records if record.image is not None}.values())
    deep = sum(_mode(source.path) in DEEP_GRAY for source in sources[:_MAX_OPENED] if source.path is not None)
    if not deep:
        return []
    seen = f"{deep} of {counted(min(len(sources), _MAX_OPENED), 'image')} that were looked at"
    return [
        "images:",
        f"  # {seen} have more than 8 bits. auto: each is shown by its own range; [0, 4095] shows all alike.",
        "  window: auto",
    ]


def _mode(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                return image.mode
    except Exception:  # noqa: BLE001 - the check has the message
        return ""


def _relative(data: Mapping[str, Any], start: Path) -> dict[str, Any]:
    """Return settings with paths relative to a directory where they are below it; others stay absolute."""
    settings = dict(data)
    for key in _PATHS:
        if key in settings and (path := Path(settings[key])).is_absolute() and path.is_relative_to(start):
            relative = os.path.relpath(path, start)
            # One without a slash could be the name of a data set on the Hub.
            settings[key] = relative if "/" in relative or path.is_file() else f"./{relative}"
    return settings


def _settings(data: Mapping[str, Any], indent: str) -> list[str]:
    return [f"{indent}{key}: {one_line(value)}" for key, value in data.items() if key not in ("group", "validation")]
