"""Damaged tar shards: the message names the shard and the record, and nothing is lost without a message."""

from __future__ import annotations

import gzip
import logging
import tarfile
from pathlib import Path

import pytest

from lora_llava.data.load import load_records
from lora_llava.data.sources.files.shards import check_shard, damaged_shard
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from tests.helpers.raw_data import shards


def settings(directory: Path) -> DataSettings:
    columns = {"image": "png", "question": {"text": "What is it?"}, "answer": "txt"}
    return DataSettings.model_validate({"path": str(directory), "columns": columns})


def refuses(shard: Path) -> bool:
    try:
        check_shard(shard)
    except DataError:
        return True
    return False


# In the middle of an image, and at the end of a block, as file systems cut.
@pytest.mark.parametrize("rest", [40, 0])
def test_a_shard_cut_in_a_record_is_named_with_the_record(tmp_path: Path, rest: int) -> None:
    shard = shards(tmp_path) / "00001.tar"
    with tarfile.open(shard) as archive:
        cut = archive.getmember("000008.png")
    content = shard.read_bytes()
    assert cut.size > rest
    shard.write_bytes(content[: cut.offset_data + rest])
    with pytest.raises(DataError, match=r"00001\.tar: is damaged or cut short at record 3 \(000008\.png\): .*end of"):
        load_records(settings(tmp_path))


def test_a_cut_anywhere_is_an_error_or_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = shards(tmp_path) / "00001.tar"
    content = shard.read_bytes()
    with tarfile.open(shard) as archive:
        end = max(member.offset_data + 512 for member in archive.getmembers())
    for size in range(600, end + 1024, 97):
        shard.write_bytes(content[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            is_refused = refuses(shard)
        damage = damaged_shard(tmp_path)
        assert is_refused or damage is not None or "has no end mark" in caplog.text, size


@pytest.mark.parametrize("tail", [b"", b"\0" * 9216])
def test_a_whole_shard_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, tail: bytes) -> None:
    shard = shards(tmp_path) / "00000.tar"
    shard.write_bytes(
        shard.read_bytes().rstrip(b"\0") + bytes(1024 + 512 - len(shard.read_bytes().rstrip(b"\0")) % 512) + tail
    )
    check_shard(shard)
    assert damaged_shard(tmp_path) is None
    assert not caplog.text


def test_a_packed_shard_is_named_by_its_record_too(tmp_path: Path) -> None:
    shard = shards(tmp_path) / "00001.tar"
    packed = gzip.compress(shard.read_bytes())
    shard.rename(tmp_path / "00001.tar.gz").write_bytes(packed[: len(packed) // 2])
    damage = damaged_shard(tmp_path)
    assert damage is not None
    assert "00001.tar.gz: is damaged or cut short at record " in str(damage)


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    (shards(tmp_path) / "00002.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(DataError, match=r"00002\.tar: is damaged or cut short at its first record"):
        load_records(settings(tmp_path))
