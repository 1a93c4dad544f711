"""Check the data itself before the first step: read every source and open every image of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_llava.conversation.encode import check_template, check_turns
from lora_llava.conversation.templates import Template, get_template
from lora_llava.data.bad_records import BadRecords
from lora_llava.data.images.headers import header_problem
from lora_llava.data.images.read import image_problem
from lora_llava.data.load import image_kills_its_reader, read_source
from lora_llava.data.questions import without_blank_answer
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.sources.stored.ranges import StoredBytes
from lora_llava.errors import DataError
from lora_llava.planning.preflight.data import sources
from lora_llava.planning.preflight.findings import Finding, Notice, Problem
from lora_llava.recipe.fields import is_local
from lora_llava.recipe.settings import Recipe
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.processes import in_processes
from lora_llava.system.text import counted

_DECODED_BYTES = 64 * 2**20
"""Up to this many bytes, all images are decoded, in a second or two; beyond it, only headers and ends are read."""
_NAMED = 3


@dataclass(slots=True)
class Images:
    """The images of a run."""

    by_key: dict[str, dict[str, ImageSource]] = field(default_factory=dict)
    """By the recipe key of their data; an image that several sources share is listed under the first."""
    findings: list[Finding] = field(default_factory=list)
    """Why data could not be read, and which images are in training and test."""


def read_images(recipe: Recipe) -> Images:
    """Read the records of every local source of a recipe; images are looked up, not opened.

    Sources with `on_bad_record: skip` are left out: the run opens all their images itself before it plans.
    """
    images = Images()
    known, trained = set[str](), set[str]()
    for key, data in _local_sources(recipe):
        try:
            records = _read(data, key, _template(recipe, key))
        except DataError as error:
            images.findings.append(Problem(key, str(error), ""))
            continue
        shown = {record.image.identity: record.image for record in records if record.image is not None}
        images.by_key[key] = {name: image for name, image in shown.items() if name not in known}
        known |= shown.keys()
        if not key.startswith("evaluation"):
            trained |= set() if key.endswith(".validation") else shown.keys()
        elif both := len(shown.keys() & trained):
            what = f"{both:,} of {counted(len(shown), 'image')} {'is' if both == 1 else 'are'} in the training data too"
            images.findings.append(Notice(key, f"{what}, so the score is better than on new images"))
    return images


def images_can_be_opened(images: Images) -> Iterator[Finding]:
    """Open every image in parallel; of many that fail, the first few are named."""
    everything = [image for sources_of_key in images.by_key.values() for image in sources_of_key.values()]
    work = image_problem if _fits(everything) else header_problem
    errors = iter(in_processes(work, everything, on_crash=image_kills_its_reader, label="images"))
    for key, sources_of_key in images.by_key.items():
        errors_of_key = [error for _, error in zip(sources_of_key, errors, strict=False) if error is not None]
        if len(errors_of_key) == 1:
            yield Problem(key, str(errors_of_key[0]), "")
        elif errors_of_key:
            named = "; ".join(map(str, errors_of_key[:_NAMED])) + (
                f"; and {len(errors_of_key) - _NAMED:,} more" if len(errors_of_key) > _NAMED else ""
            )
            what = f"{len(errors_of_key):,} of {counted(len(sources_of_key), 'image')} cannot be opened: {named}"
            yield Problem(key, what, "lora-llava check lists them all, and on_bad_record: skip leaves them out.")


def images_have_their_names(images: Images) -> Iterator[Finding]:
    """The files of images have the extensions that the data say."""
    for key, sources_of_key in images.by_key.items():
        if others := [image for image in sources_of_key.values() if image.asked]:
            shown = f"{others[0].asked} is {Path(others[0].key).name}"
            what = f"{counted(len(others), 'image')} found with another extension than in the data, such as: {shown}"
            yield Notice(key, what)


def _local_sources(recipe: Recipe) -> Iterator[tuple[str, DataSettings]]:
    for key, data in sources(recipe):
        is_here = is_local(data.path) or Path(data.path).expanduser().exists()
        if is_here and data.on_bad_record == "error":
            yield key, data


def _template(recipe: Recipe, key: str) -> Template:
    """Return the template that encodes the data of a key; the evaluation asks in that of the last stage."""
    stages = recipe.stage_names
    stage = next((name for name in stages if key.startswith(f"stages.{name}.")), stages[-1])
    return get_template(recipe.stage(stage).template)


def _read(data: DataSettings, key: str, template: Template) -> list[Record]:
    records = read_source(data, BadRecords.by_settings(data))
    if not records:
        raise DataError(f"{data.path}: holds no records; correct path or split")
    for record in records:
        is_asked = key.startswith("evaluation")
        turns = without_blank_answer(record).turns if is_asked else record.turns
        check_turns(turns, turns[-1].role if is_asked else "assistant", record.where)
        check_template(turns, template, record.where)
    return records


def _fits(images: list[ImageSource]) -> bool:
    """Tell whether all images together are few bytes."""
    left = _DECODED_BYTES
    for image in images:
        try:
            left -= _bytes(image)
        except OSError:
            continue
        if left < 0:
            return False
    return True


def _bytes(image: ImageSource) -> int:
    if image.path is not None:
        return image.path.stat().st_size
    return image.data.length if isinstance(image.data, StoredBytes) else len(image.data or b"")
