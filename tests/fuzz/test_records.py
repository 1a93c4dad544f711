"""The record reader: every entry becomes a record or a named bad one, and no error but DataError comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.data.bad_records import BadRecords
from lora_llava.data.load import fingerprint, read_source
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from tests.fuzz.mutations import changed_bytes, changed_value
from tests.helpers.faulty import entry

ENTRIES = [
    entry("1", "a.png", "What?", "a cat"),
    entry("2", "sub/b.png", "Why?", "so") | {"image": ["sub/b.png"]},
    {"conversations": [{"from": "user", "value": "x"}, {"from": "assistant", "value": "y"}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("records")
    (directory / "sub").mkdir()
    (directory / "a.png").write_bytes(b"x")
    (directory / "sub" / "b.png").write_bytes(b"x")
    (directory / "out.png").symlink_to("/etc/hostname")
    return directory


def read(folder: Path, name: str, content: bytes, **settings: Any) -> int | None:
    """Read data strictly and leniently; returns how many entries were seen, None if the file cannot be read at all."""
    (folder / name).write_bytes(content)
    data = DataSettings.model_validate({"path": str(folder / name), **settings})
    try:
        strict = read_source(data, BadRecords(data, 0))
    except DataError as error:
        assert str(error)
        assert str(folder) not in str(error).replace(f"missing in {folder}", "")
        strict = None
    bad = BadRecords(data, None)
    try:
        lenient = read_source(data, bad)
    except DataError:
        assert strict is None
        return None
    if strict is not None:
        assert fingerprint(strict) == fingerprint(lenient)
        assert not bad.records
    numbers = [record.number for record in lenient] + [one.record for one in bad.records]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    for record in lenient:
        assert record.image is None or record.image.path is None or record.image.path.is_relative_to(folder.resolve())
    for one in bad.records:
        assert json.loads(one.line())["record"] == one.record
    return len(numbers)


@given(content=changed_bytes([json.dumps(ENTRIES).encode(), "\n".join(map(json.dumps, ENTRIES)).encode()]))
def test_changed_text(folder: Path, content: bytes) -> None:
    read(folder, "data.json", content)
    read(folder, "data.jsonl", content)


@pytest.mark.fault("images: paths that leave the image root, also through links")
@given(entries=changed_value(ENTRIES), grouped=st.booleans())
def test_changed_values(folder: Path, entries: Any, grouped: bool) -> None:
    settings = {"group": "patient"} if grouped else {}
    seen = read(folder, "data.json", json.dumps(entries).encode(), **settings)
    if isinstance(entries, list) and seen is not None:
        assert seen == len(entries)
