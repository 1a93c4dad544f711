"""Bad records: skipped up to a limit, named, or left out by a list; and splits by group."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from lora_llava.data.bad_records import BadRecord, Exclusions
from lora_llava.data.load import fingerprint, load_records, load_split
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from lora_llava.system import processes
from lora_llava.system.processes import in_processes
from tests.helpers.faulty import encoded, entry, plant, scene, sound_data


def settings(folder: Path, **changes: Any) -> DataSettings:
    return DataSettings.model_validate({"path": str(folder / "train.json"), **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good records, a missing and a damaged image, and no answer in the seventh."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(scene(ord(name[0]))))
    (tmp_path / "cut.png").write_bytes(encoded(scene(1))[:-40])
    entries = [entry(f"id{n}", "ab"[n % 2] + ".png", f"q{n}", "a") for n in range(4)]
    entries += [
        entry("gone", "gone.png", "q", "a"),
        entry("cut", "cut.png", "q", "a"),
        entry("mute", "a.png", "q", "a"),
    ]
    entries[6]["conversations"][1].pop("value")
    (tmp_path / "train.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path


def test_the_first_bad_record_stops_the_run_by_default(folder: Path) -> None:
    with pytest.raises(DataError, match=r"record 7 \(id mute\): conversations\[1\]\.value: is empty"):
        load_records(settings(folder))


@pytest.mark.fault("images: missing files")
def test_skipped_records_are_named_before_the_run_with_their_images_opened(folder: Path) -> None:
    skipped: list[BadRecord] = []
    records = load_records(settings(folder, on_bad_record="skip"), skipped)
    assert [record.id for record in records] == ["id0", "id1", "id2", "id3"]
    assert [(one.data, one.record, one.id, one.kind) for one in skipped] == [
        ("train.json", 5, "gone", "missing_image"),
        ("train.json", 6, "cut", "bad_image"),
        ("train.json", 7, "mute", "record"),
    ]
    assert all(str(folder) not in one.problem for one in skipped)


def test_each_record_of_a_damaged_image_is_named_by_itself(folder: Path) -> None:
    entries = [entry(name, "cut.png", "q", "a") for name in ("first", "second")]
    (folder / "train.json").write_text(json.dumps([entry("good", "a.png", "q", "a"), *entries]), encoding="utf-8")
    skipped: list[BadRecord] = []
    load_records(settings(folder, on_bad_record="skip"), skipped)
    assert [one.problem.partition(", image cut.png: ")[0] for one in skipped] == [
        "train.json, record 2 (id first)",
        "train.json, record 3 (id second)",
    ]
    assert all("the image is truncated or damaged" in one.problem for one in skipped)


def test_more_than_the_limit_stops_the_run(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"train\.json: more than max_bad_records 2 records cannot be used; the last is"
    ):
        load_records(settings(folder, on_bad_record="skip", max_bad_records=2))
    assert len(load_records(settings(folder, on_bad_record="skip", max_bad_records=3))) == 4


def test_a_record_that_a_check_refuses_is_skipped_before_turns_are_merged(folder: Path) -> None:
    def refuse(record: Any) -> None:
        if record.id == "id0":
            raise DataError(f"{record.where}: too long", "unsupervised")

    skipped: list[BadRecord] = []
    data = settings(folder, on_bad_record="skip", merge_turns=8)
    train, _ = load_split(data, 0, skipped, refuse)
    assert [(record.id, len(record.turns)) for record in train] == [("id1", 4), ("id2", 2)]
    assert [one.record for one in skipped] == [1, 5, 6, 7]


def test_excluding_gives_what_skipping_gives(folder: Path) -> None:
    skipped: list[BadRecord] = []
    kept = load_records(settings(folder, on_bad_record="skip"), skipped)
    (folder / "bad.jsonl").write_text("".join(one.line() for one in skipped), encoding="utf-8")
    excluded = load_records(settings(folder, exclude=str(folder / "bad.jsonl")))
    assert fingerprint(excluded) == fingerprint(kept)
    assert [record.number for record in excluded] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"record": 1, "id": "other"}', "record 1 should have id 'other', but has 'id0'"),
        ('{"record": 8}', "names record 8, but the data has 7"),
        ('{"record": 0}', 'line 1: write a record to leave out as {"record": 17}'),
        ('{"record": true}', "line 1: write a record"),
        ("17", "line 1: write a record"),
        ("\n{", "line 2: write a record"),
        ("[" * 20_000, "line 1: write a record"),
        ('{"record": 1, "id": 3}', "line 1: write a record"),
    ],
)
def test_a_list_that_does_not_fit_the_data_is_refused(folder: Path, lines: str, message: str) -> None:
    (folder / "bad.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_records(settings(folder, exclude=str(folder / "bad.jsonl"), on_bad_record="skip"))
    assert message in str(caught.value)


def test_a_missing_list_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"exclude: .* cannot be read: No such file"):
        load_records(settings(folder, exclude=str(folder / "gone.jsonl")))


def test_lines_that_are_no_json_are_skipped_and_excluded(folder: Path) -> None:
    good = json.dumps(entry("x", "a.png", "q", "a"))
    (folder / "train.jsonl").write_text(f"{good}\n{{broken\n{good}\n", encoding="utf-8")
    data = {"path": str(folder / "train.jsonl")}
    skipped: list[BadRecord] = []
    assert len(load_records(DataSettings.model_validate(data | {"on_bad_record": "skip"}), skipped)) == 2
    assert [(one.record, one.id) for one in skipped] == [(2, None)]
    (folder / "bad.jsonl").write_text('{"record": 2}', encoding="utf-8")
    assert len(load_records(DataSettings.model_validate(data | {"exclude": str(folder / "bad.jsonl")}))) == 2


@pytest.mark.fault("records: duplicate ids; images or groups in both training and validation")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_no_group_is_on_both_sides(tmp_path: Path, seed: int, share: float) -> None:
    entries = []
    for number in range(24):
        # Patients share images, so that what must stay together is more than one patient's records.
        name = f"{number // 2}.png"
        (tmp_path / name).write_bytes(encoded(scene(number // 2, 8)))
        entries.append(entry(str(number), name, f"q{number}", "a", f"p{(number + 1) // 3}"))
    (tmp_path / "train.json").write_text(json.dumps(entries), encoding="utf-8")
    sides = load_split(settings(tmp_path, group="patient", validation={"share": share}), seed)
    for key in (lambda record: record.group, lambda record: record.image.key):
        assert not {key(one) for one in sides[0]} & {key(one) for one in sides[1]}
    assert sum(map(len, sides)) == 24


@pytest.mark.parametrize("value", [None, 1.5, True, "", ["x"]])
def test_a_record_without_its_group_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a.png").write_bytes(encoded(scene(0)))
    made = entry("x", "a.png", "q", "a") | {"patient": value}
    (tmp_path / "train.json").write_text(json.dumps([made]), encoding="utf-8")
    with pytest.raises(DataError, match=r"record 1 \(id x\): patient is .*, must be a string or an integer"):
        load_records(settings(tmp_path, group="patient"))


def test_planted_faults_can_be_skipped_too(tmp_path: Path) -> None:
    images, train, tested = sound_data()
    before = len(train)
    planted = plant(images, train, tested)
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "train.json").write_text(json.dumps(train), encoding="utf-8")
    skipped: list[BadRecord] = []
    records = load_records(settings(tmp_path, on_bad_record="skip", max_bad_records=99), skipped)
    here = {"missing_image", "bad_image", "image_path"}
    expected = {i for kind, part, i in planted if kind in here and part == "instruct"} | {"no-turns", "wrong-role"}
    assert {one.id for one in skipped} == expected
    assert len(records) == before + sum(part == "instruct" for _, part, _ in planted) - len(expected)


def test_an_item_that_kills_its_process_is_the_only_one_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(item: int) -> int:
        if item in (3, 37):
            os._exit(9)
        return item * item

    heard: list[int] = []
    monkeypatch.setattr(processes, "counting", lambda *_: nullcontext(heard.append))
    done = in_processes(work, range(50), on_crash=lambda item: -item, workers=2)
    assert done == [-item if item in (3, 37) else item * item for item in range(50)]
    assert sum(heard) == 50
    assert in_processes(work, [], on_crash=lambda item: item) == []


def test_a_line_separator_in_a_text_of_a_list_ends_no_line(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"record": 2, "problem": "a\u2028b\x85c"}\r\n', encoding="utf-8", newline="")
    assert Exclusions(str(folder / "bad.jsonl")).ids == {2: None}
