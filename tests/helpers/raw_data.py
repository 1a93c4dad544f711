"""Data as people have them, in ten forms, a dozen records each."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.published_sets import coco_instances, dicom, labelstudio, picture

COUNT = 12
CLASSES = ("crack", "good", "stain")


def class_folders(directory: Path) -> Path:
    """A folder of images for each class."""
    for index in range(COUNT):
        label = CLASSES[index % 3]
        picture(directory / label / f"{index}.png", (12, 10), index)
    return directory


def table(directory: Path) -> Path:
    """Class folders, a third of them 12-bit, with a semicolon CSV in Windows' encoding that names files alone."""
    class_folders(directory)
    lines = ["file;label;remark;device_id"]
    for index in range(COUNT):
        label = CLASSES[index % 3]
        if label == "stain":
            values = np.random.default_rng(index).integers(0, 4096, (10, 12), dtype=np.uint16)
            Image.fromarray(values).save(directory / label / f"{index}.png")
        lines.append(f"{index}.png;{label};gepr\u00fcft;{index // 2}")
    (directory / "labels.csv").write_text("\r\n".join(lines), encoding="cp1252")
    return directory


def _conversation(index: int) -> list[dict[str, str]]:
    asked = f"<image>\nWhich part is number {index}?"
    return [
        {"from": "human", "value": asked},
        {"from": "gpt", "value": f"It is the part number {index} of the engine."},
    ]


def llava_json(directory: Path) -> Path:
    """LLaVA JSON, with the images in a folder of another name, and a file of test data."""
    for index in range(COUNT):
        picture(directory / "pictures" / f"{index}.jpg", (12, 10), index)
    records = [
        {"id": str(index), "image": f"{index}.jpg", "patient": index // 3, "conversations": _conversation(index)}
        for index in range(COUNT)
    ]
    (directory / "train.json").write_text(json.dumps(records[:9]), encoding="utf-8")
    (directory / "test.json").write_text(json.dumps(records[9:]), encoding="utf-8")
    return directory


def messages(directory: Path) -> Path:
    """JSON Lines of messages with a list of images."""
    rows = []
    for index in range(COUNT):
        picture(directory / "images" / f"{index}.png", (12, 10), index)
        turns = [{"role": "user", "content": f"<image>Number {index}?"}, {"role": "assistant", "content": "yes"}]
        rows.append(json.dumps({"messages": turns, "images": [f"images/{index}.png"]}))
    (directory / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return directory / "data.jsonl"


def _png(index: int) -> bytes:
    stream = io.BytesIO()
    values = np.random.default_rng(index).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def parquet(directory: Path) -> Path:
    """A parquet file with the bytes of its images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": _png(index), "path": None}, "question": f"Number {index}?", "answer": "yes"}
        for index in range(COUNT)
    ]
    pq.write_table(pa.Table.from_pylist(rows), directory / "data.parquet")
    return directory / "data.parquet"


def shards(directory: Path) -> Path:
    """Two tar shards of images and captions."""
    for shard in range(2):
        with tarfile.open(directory / f"{shard:05d}.tar", "w") as archive:
            for index in range(shard * 6, shard * 6 + 6):
                for suffix, data in (("png", _png(index)), ("txt", f"A caption of number {index}.".encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return directory


def wrong(directory: Path) -> Path:
    """Records of which no key says what they are."""
    rows: list[dict[str, Any]] = [{"alpha": 1, "beta": [2]} for _ in range(COUNT)]
    (directory / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return directory / "data.json"


READ: dict[str, Callable[[Path], Path]] = {
    "class folders": class_folders,
    "csv": table,
    "llava json": llava_json,
    "messages": messages,
    "parquet": parquet,
    "shards": shards,
}
CONVERTED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "coco": (coco_instances, "lora-llava convert coco {data} converted. Then"),
    "label studio": (labelstudio, "lora-llava convert labelstudio {data} converted. Then"),
    "dicom": (dicom, "lora-llava convert dicom {data} converted --table {data}/reports.csv. Then"),
}
"""Forms that must be converted, and the command that the message gives."""
