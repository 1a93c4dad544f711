"""Convert Visual Genome's questions and region descriptions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_llava.data.convert.boxes import check_size, corners, llava_box
from lora_llava.data.convert.fields import WRONG_FIELD, DropError, identity, mapping, number, numbered, text
from lora_llava.data.convert.objects import BOX_RULE, WHERE
from lora_llava.data.convert.writer import ConvertOptions, Picture, Writer
from lora_llava.data.sources.cells import kind_of
from lora_llava.data.sources.tables import read_document
from lora_llava.errors import DataError

_FILES = ("question_answers.json", "region_descriptions.json")
_FOLDERS = ("", "VG_100K/", "VG_100K_2/")
REGION = "Please provide a short description for this region: {}"
"""How LLaVA-1.5 was asked to describe a box."""


def convert_visual_genome(source: Path, output: Path, options: ConvertOptions) -> Writer:
    """Write a record for each question, and records that lead from the phrase of a region to its box and back.

    `source`: question_answers.json, region_descriptions.json, or a directory with one or both.
    """
    files = [source / name for name in _FILES if (source / name).is_file()] if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise DataError(f"{source}: holds none of {' and '.join(_FILES)}; correct SRC")
    root = options.images or (source if source.is_dir() else source.parent)
    with Writer(output, root, options) as writer:
        for path in files:
            content = read_document(path)
            if not isinstance(content, list):
                raise DataError(
                    f"{path.name}: holds {kind_of(content)}, must hold a list of images with qas or regions"
                )
            for where, value in numbered(content, path.name):
                with writer.report.dropping():
                    _convert_image(writer, mapping(value, where), where)
        if writer.report.types["where"] or writer.report.types["region"]:
            writer.report.rules.append(
                f"Regions: at most {options.per_image} an image, drawn with the seed, of phrases that occur once "
                f"in it; every second one asks for the box, the others for the phrase. {BOX_RULE}"
            )
    return writer


def _convert_image(writer: Writer, entry: dict[str, Any], where: str) -> None:
    # The published files name the image by one key or the other.
    key = identity(entry, "id" if "id" in entry else "image_id", where)
    name = next((folder for folder in _FOLDERS if writer.exists(f"{folder}{key}.jpg", where)), "") + f"{key}.jpg"
    picture = writer.picture(name, where)
    if isinstance(entry.get("qas"), list):
        _write_questions(writer, numbered(entry["qas"], f"{where}: qas"), picture)
    elif isinstance(entry.get("regions"), list):
        _write_regions(writer, key, numbered(entry["regions"], f"{where}: regions"), picture)
    else:
        raise DropError(f"{where}: has neither a list of qas nor of regions", WRONG_FIELD)


def _write_questions(writer: Writer, entries: Iterable[tuple[str, Any]], picture: Picture) -> None:
    for where, value in entries:
        with writer.report.dropping():
            entry = mapping(value, where)
            record = {"id": f"qa/{identity(entry, 'qa_id', where)}", "image": picture.path}
            record |= {"question": text(entry, "question", where), "answer": text(entry, "answer", where)}
            writer.write(record, kind="qa")


def _write_regions(writer: Writer, image: str, entries: Iterable[tuple[str, Any]], picture: Picture) -> None:
    regions: list[tuple[str, str, str]] = []
    for where, value in entries:
        with writer.report.dropping():
            entry = mapping(value, where)
            check_size(picture, None, where)
            box = corners(*(number(entry, key, where) for key in ("x", "y", "width", "height")))
            phrase, key = text(entry, "phrase", where), identity(entry, "region_id", where)
            regions.append((key, phrase, llava_box(box, picture.size, f"{where}: box")))
    counts = Counter(phrase for _, phrase, _ in regions)
    single = [region for region in regions if counts[region[1]] == 1]
    rng = random.Random(f"{writer.options.seed}/{image}/regions")
    for index, (key, phrase, box_text) in enumerate(rng.sample(single, min(len(single), writer.options.per_image))):
        record = {"id": f"region/{key}", "image": picture.path}
        if index % 2 == 0:
            writer.write({**record, "question": WHERE.format(phrase), "answer": box_text}, kind="where")
        else:
            writer.write({**record, "question": REGION.format(box_text), "answer": phrase}, kind="region")
