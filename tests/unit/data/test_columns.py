"""Hugging Face data sets as records."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lora_llava.data.images.headers import header_problem
from lora_llava.data.images.read import open_image
from lora_llava.data.load import load_records
from lora_llava.data.record import ImageSource, Record
from lora_llava.data.sources.stored.arrow import image_cells
from lora_llava.data.sources.stored.ranges import StoredBytes
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings

QA = {"image": "image", "question": "question", "answer": "answer"}
MESSAGES = {"image": "image", "messages": "messages"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def cell(red: int) -> dict[str, Any]:
    return {"bytes": png(red), "path": None}


def write(path: Path, rows: list[dict[str, Any]], image: bool = True) -> Path:
    table = datasets.Dataset.from_list(rows)
    if image:
        table = table.cast_column("image", datasets.Image(decode=False))
    table.to_parquet(path)
    return path


def load(path: Path | str, columns: dict[str, str] = QA, **settings: Any) -> list[Record]:
    return load_records(DataSettings.model_validate({"path": str(path), "columns": columns, **settings}))


def rows() -> list[dict[str, Any]]:
    return [
        {"image": cell(1), "question": "What?", "answer": "a"},
        {"image": cell(2), "question": "Why?", "answer": "b"},
        {"image": cell(1), "question": "How?", "answer": "c"},
        {"image": None, "question": "No image?", "answer": "d"},
    ]


def test_parquet_file_with_questions_and_answers(tmp_path: Path) -> None:
    records = load(write(tmp_path / "vqa.parquet", rows()), answer_prompt="Briefly.")
    assert [record.where for record in records] == [f"vqa.parquet (train), record {n}" for n in (1, 2, 3, 4)]
    assert [turn.text for turn in records[0].turns] == ["<image>\nWhat?\nBriefly.", "a"]
    assert [turn.text for turn in records[3].turns] == ["No image?\nBriefly.", "d"]
    images = [record.image for record in records]
    assert images[0] is images[2]
    assert images[3] is None
    assert images[0] is not None
    assert images[1] is not None
    assert images[0].key != images[1].key
    assert images[0].path is None
    assert open_image(images[0]).getpixel((0, 0)) == (1, 0, 0)


def test_directory_split_and_max_records(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.parquet", rows()[:1])
    write(tmp_path / "set" / "test.parquet", rows())
    records = load(tmp_path / "set", split="test", max_records=3)
    assert [record.where for record in records] == [f"set (test), record {n}" for n in (1, 2, 3)]


def test_directory_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    for name, red in (("x.png", 1), ("y.png", 2)):
        (folder / name).write_bytes(png(red))
    lines = [{"file_name": "x.png", "question": "What?", "answer": "a"}]
    lines += [{"file_name": "y.png", "question": "Why?", "answer": "b"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = load(tmp_path / "folder")
    assert first.image is not None
    assert second.image is not None
    assert [first.image.key, second.image.key] == ["train/x.png", "train/y.png"]
    assert open_image(second.image).getpixel((0, 0)) == (2, 0, 0)


def test_text_only_data_set_has_no_image_column(tmp_path: Path) -> None:
    path = write(tmp_path / "text.parquet", [{"question": "Q", "answer": "A"}], image=False)
    (record,) = load(path, {"question": "question", "answer": "answer"})
    assert record.image is None


def test_messages_with_strings_and_with_parts(tmp_path: Path) -> None:
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}]
    (record,) = load(write(tmp_path / "a.parquet", [{"image": cell(1), "messages": plain}]), MESSAGES)
    assert [(turn.role, turn.text) for turn in record.turns] == [("user", "<image>\nWhat?"), ("assistant", "a")]
    parts = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    (record,) = load(write(tmp_path / "b.parquet", [{"image": cell(1), "messages": parts}]), MESSAGES)
    assert [turn.text for turn in record.turns] == ["<image>\nWhat?", "a"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "answer: is an empty list"),
        ({"x": 1}, "answer: is an object, must be text; convert it"),
        (None, "answer: is empty, must be text"),
    ],
)
def test_answers_that_are_no_text_are_refused(tmp_path: Path, answer: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", [{"image": cell(1), "question": "What?", "answer": answer}])
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"a.parquet (train), record 1: {message}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("x", "messages: is text, must be a list of turns"),
        (
            [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}],
            "messages[1].role: is 'system', must be one of human, user, gpt, assistant; only the first turn may be",
        ),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages[0].content: has a part of type 'video'"),
        ([{"role": "user", "content": 3}], "messages[0].content: is a number, must be text"),
    ],
)
def test_broken_messages_are_named_with_the_place(tmp_path: Path, messages: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", [{"image": cell(1), "messages": messages}])
    with pytest.raises(DataError) as caught:
        load(path, MESSAGES)
    assert str(caught.value).startswith(f"a.parquet (train), record 1: {message}")


@pytest.mark.fault("records: an image without `<image>`, `<image>` without an image, two of either")
def test_placeholder_without_an_image_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"image": None, "question": "<image>?", "answer": "a"}, rows()[0]])
    with pytest.raises(DataError, match="record 1: <image> in the text, but the record has no image"):
        load(path)


@pytest.mark.fault("images: paths that leave the image root, also through links")
def test_path_that_a_row_brings_must_lead_into_the_root(tmp_path: Path) -> None:
    row = {"image": {"bytes": None, "path": "/etc/hostname"}, "question": "What?", "answer": "a"}
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=r"record 1: image: .* must be relative to"):
        load(write(tmp_path / "set" / "a.parquet", [row, rows()[0]]))


def test_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows())
    with pytest.raises(DataError, match="there is no 'query'; it has image, question, answer"):
        load(path, QA | {"question": "query"})


def test_column_without_images_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"image": 3, "question": "What?", "answer": "a"}], image=False)
    with pytest.raises(DataError, match="column 'image' holds no images"):
        load(path)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet does not exist\. Correct the path\."):
        load(tmp_path / "gone.parquet")
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(DataError, match=r"a\.xml: a \.xml file is not read. Save it as CSV"):
        load(tmp_path / "a.xml")
    (tmp_path / "bad.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"bad\.parquet: the dataset cannot be read"):
        load(tmp_path / "bad.parquet")


def test_k38_own_columns_and_names_of_images_are_kept_for_an_evaluation(tmp_path: Path) -> None:
    own = [{"type": "open", "patient": 7, "score": float("nan"), "boxes": [1, 2]} for _ in rows()]
    named = [
        {**row, **one, "image": row["image"] and {**row["image"], "path": path}}
        for row, one, path in zip(rows(), own, ("ward/a.png", "/home/me/b.png", "ward/a.png", None), strict=True)
    ]
    path = write(tmp_path / "t.parquet", named)
    data = DataSettings.model_validate({"path": str(path), "columns": QA, "group": "patient"})
    records = load_records(data, extra=True)
    assert dict(records[0].extra) == {"type": "open", "patient": 7, "score": None}
    assert [record.image and record.image.label for record in records] == ["ward/a.png", "b.png", "ward/a.png", None]
    assert not any(record.extra for record in load_records(data))


def stored(record: Record) -> StoredBytes:
    assert record.image is not None
    assert isinstance(record.image.data, StoredBytes)
    return record.image.data


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [1, 2, 1]),
        ({"split": "train[1:3]"}, [2, 1]),
        ({"split": "train[:50%]"}, [1, 2]),
        ({"max_records": 2}, [1, 2]),
    ],
)
def test_k25_images_in_parquet_stay_in_the_file(tmp_path: Path, settings: dict[str, Any], kept: list[int]) -> None:
    records = load(write(tmp_path / "vqa.parquet", rows()), **settings)
    assert [stored(record).read() for record in records if record.image] == [png(red) for red in kept]
    assert all(stored(record).path == tmp_path / "vqa.parquet" for record in records if record.image)
    assert [record.image.key for record in records if record.image] == [sha256(png(red)).hexdigest() for red in kept]
    assert [open_image(record.image).getpixel((0, 0)) for record in records if record.image] == [
        (red, 0, 0) for red in kept
    ]


def test_k25_images_of_a_directory_with_several_files_stay_in_them(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(3):
        write(
            tmp_path / "set" / f"train-{number}.parquet", [{"image": cell(number), "question": "?", "answer": "a"}] * 2
        )
    records = load(tmp_path / "set")
    assert [stored(record).read() for record in records] == [png(number) for number in (0, 0, 1, 1, 2, 2)]
    assert [stored(record).path.name[6] for record in records] == list("001122")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("in_list", [False, True])
def test_k25_plain_bytes_and_lists_of_images_stay_in_the_file(tmp_path: Path, kind: Any, in_list: bool) -> None:
    if in_list:
        images = pa.array(
            [[cell(5)], [], None, [cell(6)]], pa.list_(pa.struct([("bytes", kind), ("path", pa.string())]))
        )
    else:
        images = pa.array([png(5), None, None, png(6)], kind)
    pq.write_table(pa.table({"image": images, "question": ["?"] * 4, "answer": ["a"] * 4}), tmp_path / "a.parquet")
    records = load(tmp_path / "a.parquet")
    assert [record.image is None for record in records] == [False, True, True, False]
    assert [stored(record).read() for record in records if record.image] == [png(5), png(6)]


def test_k25_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    [record] = load(write(tmp_path / "vqa.parquet", rows()[:1]))
    stored(record).path.unlink()
    assert record.image is not None
    with pytest.raises(DataError, match=r"vqa.parquet \(train\), record 1.*cannot be read"):
        open_image(record.image)


MEASURE = """
import re, sys
from pathlib import Path
from lora_llava.data.images.headers import header_problem
from lora_llava.data.images.read import open_image
from lora_llava.data.load import load_records
from lora_llava.recipe.stages import DataSettings
import datasets, pyarrow.parquet
datasets.disable_progress_bars()
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
columns = {"image": "image", "question": "question", "answer": "answer"}
records = load_records(DataSettings.model_validate({"path": sys.argv[1], "columns": columns}))
for record in records:
    open_image(record.image)
print(len(records), peak() - before)
"""


def test_k25_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    noise = random.Random(0)
    pictures = []
    for _ in range(8):
        buffer = io.BytesIO()
        Image.frombytes("RGB", (400, 400), noise.randbytes(480_000)).save(buffer, "PNG", compress_level=0)
        pictures.append(buffer.getvalue())
    # Different bytes of the same picture.
    entries = [{"bytes": pictures[number % 8] + str(number).encode(), "path": None} for number in range(640)]
    table = pa.table({"image": entries, "question": ["?"] * 640, "answer": ["a"] * 640})
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=40, compression="none")
    assert (tmp_path / "large.parquet").stat().st_size > 300e6
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    count, grown = map(int, done.stdout.split())
    assert count == 640
    assert grown < 150


def test_hashes_are_remembered_as_long_as_the_cache_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "saved"
    table = datasets.Dataset.from_list(rows()).cast_column("image", datasets.Image(decode=False))
    table.save_to_disk(path)
    reads: list[StoredBytes] = []
    original = StoredBytes.read

    def counted_read(self: StoredBytes) -> bytes:
        reads.append(self)
        return original(self)

    monkeypatch.setattr(StoredBytes, "read", counted_read)
    first = load(path)
    cache = stored(first[0]).path
    assert len(reads) == len([record for record in first if record.image])
    assert load(path) == first
    assert len(reads) == len([record for record in first if record.image]), "read again"
    hashes = cache.with_name(f"{cache.name}.sha256")
    size, *lines = hashes.read_text().splitlines()
    for damaged in ("", "0 0\n" + "\n".join(lines), size + "\nnonsense\n", "\xff"):
        reads.clear()
        hashes.write_bytes(damaged.encode("latin-1"))
        assert load(path) == first
        assert reads, damaged
    os.utime(cache, ns=(1, 1))
    reads.clear()
    assert load(path) == first
    assert reads


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_headers_of_stored_images_are_judged_without_the_rest(tmp_path: Path, form: str) -> None:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (200, 200), random.Random(0).randbytes(120_000)).save(buffer, form)
    data = buffer.getvalue()
    (tmp_path / "cache").write_bytes(b"before" + data + b"after")
    image = ImageSource("0" * 64, None, StoredBytes(tmp_path / "cache", 6, len(data)))
    assert header_problem(image) is None
    with image.open() as file:
        assert (file.read(), file.read(1)) == (data, b"")
        assert (file.seek(-3, io.SEEK_END), file.read()) == (len(data) - 3, data[-3:])
    cut = ImageSource("0" * 64, None, StoredBytes(tmp_path / "cache", 6, len(data) // 2))
    assert header_problem(cut) is not None


def test_rows_chosen_by_index_stay_in_the_cache_file(tmp_path: Path) -> None:
    path = write(tmp_path / "vqa.parquet", [{"image": cell(n), "question": "?", "answer": "a"} for n in range(6)])
    table = datasets.load_dataset("parquet", data_files=str(path), split="train").select([5, 0, 3])
    undecoded = table.cast_column("image", datasets.Image(decode=False))
    cells = [found["bytes"] for found in image_cells(undecoded, "image")]
    assert all(isinstance(found, StoredBytes) for found in cells)
    assert [found.read() for found in cells] == [png(5), png(0), png(3)]


def test_a_cache_that_ends_early_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "vqa.parquet", [{"image": cell(n), "question": "?", "answer": "a"} for n in range(40)])
    assert len(load(path)) == 40
    (cache,) = (tmp_path / "cache").rglob("*.arrow")
    whole = cache.read_bytes()
    # Zeros end a stream of Arrow; `datasets` then returns the rows before them.
    second = whole.rindex(b"\xff\xff\xff\xff", 0, len(whole) - 8)
    cache.write_bytes(whole[:second] + bytes(len(whole) - second))
    with pytest.raises(DataError, match=r"vqa\.parquet: its cache is damaged: \d+ of 40 rows; remove .*cache"):
        load(path)
    assert len(load(path, split="train[:10]")) == 10
