"""Convert a data set to LLaVA's JSON Lines, with its images and a report, all or nothing."""

from __future__ import annotations

import errno
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_llava.errors import DataError
from lora_llava.system.files import staged_result
from lora_llava.system.forms import Form, refuse_unused
from lora_llava.system.text import counted, listed, printable

if TYPE_CHECKING:
    from lora_llava.data.convert.writer import ConvertOptions, Report, Writer

REPORT = "report.json"
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What a file system says of names that it cannot hold side by side."""
_DRAWN = ("images", "seed", "per_image")
KINDS = {
    "coco": Form(f"{__package__}.coco", "convert_coco", (*_DRAWN, "question")),
    "labelstudio": Form(f"{__package__}.labelstudio", "convert_labelstudio", (*_DRAWN, "question")),
    "visual-genome": Form(f"{__package__}.visual_genome", "convert_visual_genome", _DRAWN),
    "rsvqa": Form(f"{__package__}.rsvqa", "convert_rsvqa", ("images",)),
    "r2gen": Form(f"{__package__}.r2gen", "convert_r2gen", ("images", "question")),
    "cvat": Form(f"{__package__}.cvat", "convert_cvat", _DRAWN),
    "dicom": Form(f"{__package__}.dicom", "convert_dicom", ("question", "table", "encoding", "window")),
}
"""Converters by the name of the form, with the fields of ConvertOptions that they take."""


def convert(kind: str, source: Path, output: Path, options: ConvertOptions) -> dict[str, Any]:
    """Convert `source`, a data set of a kind in KINDS, to the directory `output`, which must not exist.

    Writes JSON Lines in LLaVA's form, one file for each split; the images below `images/`; and `report.json`, which is
    returned. The same input, options and seed give the same files. Raises DataError naming file, record and field if
    nothing can be converted, ArtifactError if `output` exists or the disk is full, RecipeError for an option that the
    kind does not take.
    """
    given = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    refuse_unused(KINDS, kind, given)
    if options.images is not None and not options.images.is_dir():
        raise DataError(f"--images {options.images}: is not a directory; name the one with the images")
    with staged_result(output) as staging:
        try:
            writer: Writer = KINDS[kind](source, staging, options)
        except OSError as error:
            if error.errno not in _NAME_ERRORS:
                raise
            raise DataError(f"{printable(str(error.filename), 300)}: {error.strerror}; rename the image") from None
        if not writer.report.splits:
            raise DataError(f"{source}: nothing could be converted. {_first_drops(writer.report)}")
        content = {"kind": kind, "seed": options.seed, **writer.report.content()}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (staging / REPORT).write_text(text, encoding="utf-8")
    return {**content, "examples": writer.report.examples}


def _first_drops(report: Report) -> str:
    if not report.dropped:
        return "It holds no records; correct SRC"
    first = next(iter(report.examples.values()))[0]
    number = sum(report.dropped.values())
    return f"{counted(number, 'problem')}: the first is {first}"


def summary(report: dict[str, Any], output: Path) -> list[str]:
    """Return what a conversion wrote and left out, as lines for the terminal."""
    lines = [f"{name}: {counted(count, 'record')}" for name, count in report["records"].items()]
    lines.append("questions: " + listed([f"{count:,} {name}" for name, count in report["types"].items()]))
    lines.append("images: " + (listed([f"{count:,} {how}" for how, count in report["images"].items()]) or "none"))
    lines += [f"rule: {rule}" for rule in report["rules"]]
    for dropped in report["dropped"]:
        first = report["examples"][dropped["reason"]][0]
        lines.append(f"left out: {dropped['count']:,} x {dropped['reason']}; the first: {first}")
    lines.append(f"written to {output}; {REPORT} lists what was left out.")
    # Imported here: the command line lists KINDS before it imports anything large.
    from lora_llava.recipe.file import one_line

    group = {"group": "group"} if report["grouped"] else {}
    data = [one_line({"path": str(output / name), **group}) for name in report["records"]]
    return [*lines, *(f"In a recipe: data: {settings}" for settings in data)]
