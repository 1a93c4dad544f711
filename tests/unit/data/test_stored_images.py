"""Images inside Parquet files, which are read where they are."""

from __future__ import annotations

import itertools
import os
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_llava.data.images.read import open_image
from lora_llava.data.load import load_records
from lora_llava.data.record import Record
from lora_llava.data.sources.stored.bodies import open_body
from lora_llava.data.sources.stored.cells import LOCATION, from_row
from lora_llava.data.sources.stored.pages import Column, locate_cells
from lora_llava.data.sources.stored.ranges import SNAPPY, StoredBytes
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from tests.unit.data.test_columns import QA, png

WRITTEN = [
    *itertools.product(("none", "snappy"), ("1.0", "2.0"), (False, True), (2**10, 2**20)),
    *(("zstd", version, dictionary, 2**20) for version, dictionary in (("1.0", True), ("2.0", False))),
    ("gzip", "1.0", False, 2**10),
    ("brotli", "2.0", True, 2**20),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def some_bytes(seed: int) -> bytes:
    """Return bytes that compress in part, of up to several blocks of Snappy."""
    noise = random.Random(seed)
    parts = [noise.randbytes(noise.choice((0, 3, 70_000))), bytes(noise.choice((0, 40, 150_000))), b"abc" * 30]
    noise.shuffle(parts)
    return b"".join(parts) if seed % 7 else b""


def values(count: int) -> list[bytes | None]:
    """Return bytes, some of them equal, with nulls between."""
    return [None if index % 5 == 3 else some_bytes(index % 11) for index in range(count)]


def all_bytes(cell: Any) -> Any:
    """Return a cell with the bytes themselves."""
    if isinstance(cell, list):
        return [all_bytes(stored) for stored in cell]
    if cell is not None:
        assert cell.digest == sha256(cell.read()).hexdigest()
        with cell.open() as file:
            assert file.read() == cell.read()
    return cell and cell.read()


def located(path: Path, column: Column) -> list[Any]:
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [all_bytes(cell) for group in groups for cell in locate_cells(path, group, column)]


@pytest.mark.parametrize(("codec", "version", "dictionary", "page_size"), WRITTEN)
def test_located_bytes_equal_those_that_arrow_reads(
    tmp_path: Path, codec: str, version: str, dictionary: bool, page_size: int
) -> None:
    how: dict[str, Any] = {"compression": codec, "data_page_version": version, "use_dictionary": dictionary}
    how |= {"data_page_size": page_size, "row_group_size": 8, "write_batch_size": 3}
    flat = values(23)
    lists = [None, [], [b"x", None], [None], *(flat[index : index + 3] for index in range(4))]
    required = [value or b"" for value in flat[:9]]
    path = tmp_path / "a.parquet"
    for kind, cells, levels in (
        (pa.field("a", pa.binary()), flat, (0, 1, True)),
        (pa.field("a", pa.large_binary(), nullable=False), required, (0, 0, False)),
        (pa.field("a", pa.list_(pa.binary())), lists, (1, 3, True)),
        (pa.field("a", pa.list_(pa.binary()), nullable=False), lists[1:], (1, 2, False)),
    ):
        table = pa.table([pa.array(cells, kind.type)], schema=pa.schema([kind]))
        pq.write_table(table, path, **how)
        leaf = pq.ParquetFile(path).schema.column(0)
        assert (leaf.max_repetition_level, leaf.max_definition_level) == levels[:2]
        assert located(path, Column(0, *levels)) == cells


def write_images(path: Path, column: Any, **how: Any) -> Path:
    count = len(column)
    pq.write_table(pa.table({"image": column, "question": ["?"] * count, "answer": ["a"] * count}), path, **how)
    return path


def load(path: Path, **settings: Any) -> list[Record]:
    return load_records(DataSettings.model_validate({"path": str(path), "columns": QA, **settings}))


def where_stored(record: Record) -> Path:
    assert record.image is not None
    assert isinstance(record.image.data, StoredBytes)
    return record.image.data.path


def large_png(red: int) -> bytes:
    return png(red) + random.Random(red).randbytes(200_000)


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_images_are_not_copied(tmp_path: Path, codec: str) -> None:
    images = [{"bytes": large_png(red), "path": f"{red}.png"} for red in range(6)]
    path = write_images(tmp_path / "a.parquet", [*images, {"bytes": None, "path": None}], compression=codec)
    records = load(path)
    assert [record.image and open_image(record.image).getpixel((0, 0)) for record in records] == [
        *((red, 0, 0) for red in range(6)),
        None,
    ]
    assert [record.image and record.image.label for record in records] == [*(f"{red}.png" for red in range(6)), None]
    assert {where_stored(record) for record in records if record.image} == {path}
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()) < 50_000
    # The same cells, from the cache.
    assert load(path) == records
    path.touch()
    assert load(path) == records


@pytest.mark.parametrize(
    "how", [{"compression": "lz4"}, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}]
)
def test_other_codecs_and_encodings_are_copied(tmp_path: Path, how: dict[str, Any]) -> None:
    records = load(write_images(tmp_path / "a.parquet", [png(1), None, png(2)], **how))
    assert [record.image and open_image(record.image).getpixel((0, 0)) for record in records] == [
        (1, 0, 0),
        None,
        (2, 0, 0),
    ]
    assert {where_stored(record).suffix for record in records if record.image} == {".arrow"}


def test_the_cache_of_other_programs_keeps_the_images(tmp_path: Path) -> None:
    path = write_images(tmp_path / "a.parquet", [png(1)])
    assert where_stored(load(path)[0]) == path
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    assert rows[0]["image"] == png(1)
    assert where_stored(load(path)[0]) == path


@pytest.mark.parametrize("is_inside", [True, False])
def test_images_of_the_hub_stay_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_inside: bool) -> None:
    files = tmp_path / ("hub" if is_inside else "elsewhere") / "datasets--some--set" / "snapshots" / "0"
    files.mkdir(parents=True)
    write_images(files / "train.parquet", [png(1), png(2)])
    load_builder = datasets.load_dataset_builder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("lora_llava.data.sources.missing.offline", lambda: False)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *_, cache_dir, **__: load_builder(str(files), cache_dir=cache_dir)
    )
    records = load(Path("some/set"))
    assert [record.image and open_image(record.image).getpixel((0, 0))[0] for record in records] == [1, 2]
    assert {where_stored(record).suffix for record in records} == {".parquet" if is_inside else ".arrow"}


def test_images_of_an_element_stay_in_the_file(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array(
        [[{"bytes": png(red), "path": None} for red in pair] for pair in ((1, 2), (3, 4))], pa.list_(image)
    )
    pages = write_images(tmp_path / "a.parquet", images)
    columns = {"image": "bytes", "question": "question", "answer": "answer"}
    records = load_records(DataSettings.model_validate({"path": str(pages), "each": "image", "columns": columns}))
    assert [record.image and open_image(record.image).getpixel((0, 0))[0] for record in records] == [1, 2, 3, 4]


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_file_that_changes_after_it_was_read_is_named(tmp_path: Path, codec: str, change: str) -> None:
    path = write_images(tmp_path / "a.parquet", [large_png(1), large_png(2)], compression=codec)
    records = load(path)
    if change == "cut":
        os.truncate(path, 150_000)
    else:
        path.unlink()
    assert records[1].image is not None
    with pytest.raises(DataError, match=r"a.parquet \(train\), record 2.*cannot be read"):
        open_image(records[1].image)


@pytest.mark.parametrize("file", ["/etc/hostname", "../a.parquet", "x/../../a.parquet"])
def test_a_cache_that_names_a_file_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    row = dict.fromkeys(LOCATION) | {"file": file, "codec": "", "start": 0, "length": 3, "sha256": ""}
    with pytest.raises(DataError, match="outside of"):
        from_row([row], tmp_path)


def test_snappy_is_read_from_where_nothing_refers_to_before(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(65_536)
    literal = b"\xf4" + (65_535).to_bytes(2, "little") + noise
    # The second block refers back into the first, which Google's compressor never does.
    copy = b"\xfe" + (65_000).to_bytes(2, "little")
    size = 3 * 65_536 + 64
    elements = literal + copy + literal + literal
    (tmp_path / "page").write_bytes(b"before" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + elements)
    body = open_body(tmp_path / "page", SNAPPY, 6, 3 + len(elements), size)
    whole = noise + noise[536:600] + noise + noise
    assert body.read(size) == whole
    for position, length in ((0, 4), (65_530, 100), (65_600, 10), (140_000, 20), (size - 5, 5), (0, size)):
        stored = body.locate(position, length)
        assert stored.read() == whole[position : position + length]
    last = body.locate(size - 5, 5).packing
    assert last is not None
    assert last.span < 70_000


def test_damaged_pages_are_refused(tmp_path: Path) -> None:
    """Whatever a byte of a page becomes, the values are read or an error says that they cannot be."""
    source = tmp_path / "a.parquet"
    refused = 0
    for codec, dictionary in (("none", True), ("snappy", False), ("zstd", True)):
        cells = pa.array([[b"one", None], [b"two", b"one"], None] * 4, pa.list_(pa.binary()))
        pq.write_table(pa.table({"a": cells}), source, compression=codec, use_dictionary=dictionary)
        group, whole = pq.read_metadata(source).row_group(0), source.read_bytes()
        noise = random.Random(codec)
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(noise.choice((1, 3))):
                damaged[noise.randrange(4, group.total_byte_size + 80)] = noise.randrange(256)
            source.write_bytes(damaged)
            try:
                assert len(list(locate_cells(source, group, Column(0, 1, 3, True)))) <= 40
            except (ValueError, OSError, IndexError):
                refused += 1
    assert refused > 100
