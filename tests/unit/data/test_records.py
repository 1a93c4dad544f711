"""Data files as records, their split and their fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.data.load import fingerprint, load_records, load_split, merge_turns
from lora_llava.data.record import Record
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings


def entry(**changes: Any) -> dict[str, Any]:
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    return {"id": "000", "image": "a.png", "conversations": conversation} | changes


def text_entry(question: str = "Why?") -> dict[str, Any]:
    return {"conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": "So."}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    return tmp_path


def load(folder: Path, content: Any, name: str = "train.json", **settings: Any) -> list[Record]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return load_records(DataSettings.model_validate({"path": str(path), **settings}))


def refused(folder: Path, content: Any, name: str = "train.json", **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, content, name, **settings)
    return str(caught.value)


def test_llava_json_as_published(folder: Path) -> None:
    first, second, third = load(folder, [entry(), entry(id=7, image=["./b.png"]), text_entry()])
    assert (first.id, second.id, third.id) == ("000", "7", "3")
    assert first.where == "train.json, record 1 (id 000)"
    assert third.where == "train.json, record 3"
    assert first.image is not None
    assert (first.image.key, first.image.path, first.image.data) == ("a.png", folder / "a.png", None)
    assert second.image is not None
    assert second.image.key == "b.png"
    assert third.image is None
    assert [(turn.role, turn.text) for turn in first.turns] == [("user", "<image>\nWhat?"), ("assistant", "a cat")]


@pytest.mark.fault("records: broken JSON and JSON Lines, huge numbers, lone surrogates, NaN, duplicate keys")
def test_json_lines_with_bom_blank_lines_and_crlf(folder: Path) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(entry()).encode(), b"", json.dumps(text_entry()).encode(), b"  ", b""]
    records = load(folder, b"\r\n".join(lines), "train.jsonl")
    assert [record.where for record in records] == [
        "train.jsonl, record 1 (line 1, id 000)",
        "train.jsonl, record 2 (line 3)",
    ]


def test_an_image_is_one_source_however_often_it_is_shown(folder: Path) -> None:
    records = load(folder, [entry(), entry(id="1"), entry(id="2", image="./a.png")])
    assert records[0].image is records[1].image
    assert records[2].image is not None
    assert records[2].image.key == "a.png"


@pytest.mark.fault("records: broken JSON and JSON Lines, huge numbers, lone surrogates, NaN, duplicate keys")
@pytest.mark.fault("records: none at all, or fewer than a step takes")
@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"[{} {}]", "a.json", "a.json: line 1, column 5: not valid JSON"),
        (b'[\n{"id" 1}]', "a.json", "a.json: line 2, column 7: not valid JSON"),
        (b"\n\n[1 2]", "a.jsonl", "a.jsonl, line 3, column 4: not valid JSON"),
        (b"{}\n{}", "a.json", "name the file .jsonl"),
        (b"{}", "a.json", "a.json: holds an object, must hold a list of records"),
        (b"[]", "a.json", "holds no records"),
        (b"\n", "a.jsonl", "holds no records"),
        (b'["\xff"]', "a.json", "a.json: not UTF-8 at byte 3"),
        (b"[" * 100_000, "a.json", "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "a.json", "a number too long"),
        ([3], "a.json", "a.json, record 1: is a number, must be an object"),
        (b"{}\n[]", "a.jsonl", "a.jsonl, record 1 (line 1): conversations: is missing"),
    ],
)
def test_broken_files_are_named_with_the_place(folder: Path, content: Any, name: str, message: str) -> None:
    assert message in refused(folder, content, name)


@pytest.mark.fault("records: broken JSON and JSON Lines, huge numbers, lone surrogates, NaN, duplicate keys")
@pytest.mark.fault("records: an image without `<image>`, `<image>` without an image, two of either")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": 1.5}, "record 2: id: is a number, must be text or an integer"),
        ({"id": True}, "record 2: id: is a boolean"),
        ({"id": "\ud800"}, "record 2: id: character 1 is half of a surrogate pair"),
        ({"image": 3}, "record 2 (id 000): image: is a number, must be a path"),
        ({"image": ["a.png", "b.png"]}, "image: holds 2 images. LLaVA-1.5 takes one image per conversation"),
        ({"image": []}, "conversations: <image> in the text, but the record has no image"),
        ({"image": None}, "conversations: <image> in the text, but the record has no image"),
        ({"conversations": None}, "conversations: is missing"),
        ({"conversations": []}, "conversations: is empty"),
        ({"conversations": "x"}, "conversations: is text, must be a list of turns"),
        ({"conversations": ["x"]}, "conversations[0]: is text, must be an object"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "conversations: has only a system message; add a"),
        ({"conversations": [entry()["conversations"][0], {"from": "system", "value": "x"}]}, "[1].from: is 'system'"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "conversations[0].from: is ['x'], must be one of"),
        ({"conversations": [{"from": "human", "value": 3}]}, "conversations[0].value: is a number, must be text"),
        (
            {"conversations": [{"from": "human", "value": "a \udc00"}]},
            "conversations[0].value: character 3 is half of a surrogate pair",
        ),
        (
            {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "<image>"}]},
            "the record has an image, but no <image> in a human turn",
        ),
    ],
)
def test_broken_records_are_named_with_the_field(folder: Path, changes: dict[str, Any], message: str) -> None:
    refusal = refused(folder, [entry(), entry(**changes)])
    assert refusal.startswith("train.json, record 2")
    assert message in refusal


@pytest.mark.fault("images: paths that leave the image root, also through links")
@pytest.mark.fault("images: file names with NUL bytes, of any length, or in another Unicode normal form")
@pytest.mark.fault("images: URLs")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/passwd", "must be relative"),
        ("\\\\host\\a.png", "must be relative"),
        ("../a.png", "must be relative"),
        ("sub/../../a.png", "must be relative"),
        ("http://host/a.png", "is a URL"),
        ("file:///a.png", "is a URL"),
        ("data:image/png;base64,%%", "broken base64"),
        ("C:\\a.png", "names a drive"),
        ("a\0.png", "is not a path"),
        (" ", "is not a path"),
        ("x" * 5000, "cannot be looked up: File name too long"),
        ("link.png", "is a link out of"),
        ("linked/secret.png", "leads out of"),
        ("sub", "is not a file"),
    ],
)
def test_image_paths_stay_under_the_root(folder: Path, name: str, message: str) -> None:
    root = folder / "root"
    outside = folder / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"x")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    refusal = refused(folder, [entry(image=name)], image_root=str(root))
    assert refusal.startswith("train.json, record 1 (id 000): image: ")
    assert message in refusal


def test_a_link_inside_the_root_is_the_image_it_points_to(folder: Path) -> None:
    (folder / "same.png").symlink_to(folder / "a.png")
    first, second = load(folder, [entry(), entry(image="same.png")])
    assert first.image is not None
    assert second.image is not None
    assert first.image.key == second.image.key


@pytest.mark.fault("images: missing files")
def test_missing_images_are_counted_and_named_together(folder: Path) -> None:
    refusal = refused(folder, [entry(), *(entry(id=str(n), image=f"gone{n}.png") for n in range(7))])
    assert "7 of 8 images are missing" in refusal
    assert "gone0.png (train.json, record 2 (id 0)); gone1.png" in refusal
    assert "and 2 more" in refusal


def test_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json does not exist\. Correct the path\."):
        load_records(DataSettings(path=str(folder / "gone.json")))


def test_answer_prompt_is_the_last_line_of_each_question(folder: Path) -> None:
    talk = [
        {"from": "human", "value": "What?\n<image>"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "b"},
    ]
    (record,) = load(folder, [entry(conversations=talk)], answer_prompt="In a word.")
    assert [turn.text for turn in record.turns] == ["<image>\nWhat?\nIn a word.", "a", "Why?\nIn a word.", "b"]
    assert "answer_prompt: must not contain <image>" in refused(folder, [entry()], answer_prompt="<image>")


def test_max_records_takes_the_first_and_reads_no_further(folder: Path) -> None:
    assert len(load(folder, [entry(), entry(), "broken"], max_records=2)) == 2


def split(folder: Path, share: float, seed: int = 0, content: Any = None) -> tuple[list[Record], list[Record]]:
    entries = [entry(id=f"{name}{n}", image=name) for n in range(4) for name in ("a.png", "b.png", "c.png")]
    entries += [text_entry(f"Why {n}?") for n in range(8)]
    path = folder / "train.json"
    path.write_text(json.dumps(entries if content is None else content))
    return load_split(DataSettings.model_validate({"path": str(path), "validation": {"share": share}}), seed)


@pytest.mark.fault("records: duplicate ids; images or groups in both training and validation")
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_share_leaves_no_image_and_no_record_on_both_sides(folder: Path, share: float, seed: int) -> None:
    train, validation = split(folder, share, seed)
    assert train
    assert validation
    assert len(train) + len(validation) == 20
    sides = [{record.image.key for record in side if record.image} for side in (train, validation)]
    assert not sides[0] & sides[1]
    assert {record.where for record in train} | {record.where for record in validation} == {
        record.where for record in load_records(DataSettings(path=str(folder / "train.json")))
    }
    assert split(folder, share, seed) == (train, validation)


def test_share_depends_on_the_seed(folder: Path) -> None:
    assert len({fingerprint(split(folder, 0.3, seed)[1]) for seed in range(6)}) > 1


def test_share_of_one_large_and_one_small_image(folder: Path) -> None:
    content = [entry(image=name) for name in ("a.png", "a.png", "a.png", "b.png", "b.png")]
    train, validation = split(folder, 0.05, content=content)
    assert (len(train), len(validation)) == (3, 2)


def test_share_of_a_single_image_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="2 records of one image, or of one group"):
        split(folder, 0.5, content=[entry(), entry()])


def test_validation_by_path_and_none(folder: Path) -> None:
    (folder / "held_out.json").write_text(json.dumps([text_entry()]))
    (folder / "train.json").write_text(json.dumps([entry(), entry()]))
    settings = {"path": str(folder / "train.json"), "max_records": 1}
    assert [len(side) for side in load_split(DataSettings.model_validate(settings), 0)] == [1, 0]
    settings["validation"] = {"path": str(folder / "held_out.json")}
    train, validation = load_split(DataSettings.model_validate(settings), 0)
    assert [len(train), len(validation)] == [1, 1]
    assert validation[0].where == "held_out.json, record 1"


@pytest.mark.fault("records: changed between a run and its resume")
def test_fingerprint_changes_with_ids_words_images_and_order(folder: Path) -> None:
    base = [entry(), entry(id="1")]
    prints = [
        fingerprint(load(folder, content))
        for content in (base, base[::-1], [entry(), entry(id="2")], [entry(), entry(id="1", image="b.png")])
    ]
    prints.append(fingerprint(load(folder, base, answer_prompt="x")))
    assert len(set(prints)) == 5
    assert fingerprint(load(folder, base)) == prints[0]


def asked(number: int, image: str | None, *questions: str) -> dict[str, Any]:
    turns = []
    for place, question in enumerate(questions):
        shown = "<image>\n" if image and place == 0 else ""
        turns += [{"from": "human", "value": shown + question}, {"from": "gpt", "value": f"to {question}"}]
    made: dict[str, Any] = {"id": str(number), "conversations": turns}
    return made | ({"image": image} if image else {})


def test_merged_turns(folder: Path) -> None:
    records = load(
        folder,
        [
            asked(0, "a.png", "p"),
            asked(1, "b.png", "q"),
            asked(2, None, "r"),
            asked(3, "a.png", "s", "t"),
            asked(4, "a.png", "u"),
            asked(5, None, "v"),
        ],
    )
    merged = merge_turns(records, 3)
    assert [record.id for record in merged] == ["0", "1", "2", "4", "5"]
    assert [turn.text for turn in merged[0].turns] == ["<image>\np", "to p", "s", "to s", "t", "to t"]
    assert [turn.role for turn in merged[0].turns] == ["user", "assistant"] * 3
    assert merged[0].where == "train.json, record 1 (id 0) and 1 more about its image"
    assert merged[1:] == [records[1], records[2], records[4], records[5]]


def test_a_record_longer_than_the_merge_is_not_cut(folder: Path) -> None:
    records = load(folder, [asked(0, "a.png", "p"), asked(1, "a.png", "q", "r", "s"), asked(2, "a.png", "t")])
    assert merge_turns(records, 2) == records


def test_merging_leaves_validation_as_it_is(folder: Path) -> None:
    path = folder / "train.json"
    path.write_text(json.dumps([asked(n, f"{'abc'[n % 3]}.png", f"q{n}") for n in range(12)]))
    settings = {"path": str(path), "merge_turns": 4, "validation": {"share": 0.3}}
    train, validation = load_split(DataSettings.model_validate(settings), seed=0)
    assert len(train) == 2
    assert {len(record.turns) for record in train} == {8}
    assert len(validation) == 4
    assert {len(record.turns) for record in validation} == {2}


def test_k38_own_keys_and_folders_are_kept_for_an_evaluation(folder: Path) -> None:
    (folder / "ward").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "ward" / "a.png")
    path = folder / "test.json"
    own = {"patient": "\ud800x", "open": True, "boxes": [1], "note": None, "part": 3}
    path.write_text(json.dumps([entry(image="ward/a.png", **own), text_entry()]), encoding="utf-8")
    first, second = load_records(DataSettings(path=str(path)), extra=True)
    assert dict(first.extra) == {"patient": "?x", "open": True, "note": None, "part": 3}
    assert first.image is not None
    assert first.image.label == "ward/a.png"
    assert second.extra == ()
    assert load_records(DataSettings(path=str(path)))[0].extra == (), "training does not hold them"


@pytest.mark.parametrize(
    "cell", [{"path": 5}, {"path": ["a"]}, {"bytes": "iVBORw0"}, {"bytes": [137, 80]}, [{"path": True}]]
)
def test_an_image_of_the_wrong_type_is_refused(tmp_path: Path, cell: Any) -> None:
    record = {"id": "1", "image": cell, "conversations": [{"from": "human", "value": "<image>\nQ"}]}
    (tmp_path / "a.json").write_text(json.dumps([record]), encoding="utf-8")
    with pytest.raises(DataError, match=r"record 1 \(id 1\): image: (path|bytes): is .*, must be (text|bytes)"):
        load_records(DataSettings(path=str(tmp_path / "a.json")))
