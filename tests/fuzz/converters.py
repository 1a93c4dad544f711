"""Every converter of a published form, with a set of five records to damage; what its output must be."""

from __future__ import annotations

import json
from pathlib import Path

from lora_llava.data.convert.run import convert
from lora_llava.data.convert.writer import ConvertOptions
from tests.fuzz.foreign import Load, Loader
from tests.helpers.published_sets import SETS

CONVERTERS = tuple(SETS)
_WITHOUT_QUESTIONS = ("coco", "labelstudio", "r2gen", "dicom")
"""Kinds that have answers without a question, for which one is given."""


def make_converters(directory: Path, names: tuple[str, ...] = CONVERTERS) -> dict[str, Loader]:
    """Write a set of each form below `directory`; return the loader of each form, by name."""
    loaders = {}
    for name in names:
        (directory / name).mkdir(parents=True)
        loaders[name] = Loader(SETS[name][1](directory / name), _convert(SETS[name][0]))
    return loaders


def _convert(kind: str) -> Load:
    def load(copy: Path, out: Path) -> None:
        table = copy / "reports.csv" if kind == "dicom" else None
        question = "What is the {name}?" if kind in _WITHOUT_QUESTIONS else None
        report = convert(kind, copy, out, ConvertOptions(question=question, table=table))
        _check(out, report["records"])

    return load


def _check(out: Path, counts: dict[str, int]) -> None:
    """Assert that records are whole, and that all of the output is below it."""
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert {path.name for path in out.iterdir()} == {*counts, "images", "report.json"}
    for name, count in counts.items():
        rows = [json.loads(line) for line in (out / name).read_bytes().split(b"\n") if line]
        assert len(rows) == count
        for row in rows:
            image = out / row["image"]
            assert image.resolve().is_relative_to((out / "images").resolve())
            assert image.is_file()
            human, model = row["conversations"]
            assert human["value"].count("<image>") == 1
            assert "<image>" not in model["value"]
            assert model["value"].strip()
