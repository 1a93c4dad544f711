"""Data sets of five records in the forms in which others publish them, with content of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """Write an image of noise; its format is that of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def save(path: Path, content: Any) -> Path:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


COCO_SIZES = {1: (64, 48), 2: (48, 64), 3: (40, 40), 4: (64, 32), 5: (32, 64)}


def _coco_images(directory: Path) -> list[dict[str, Any]]:
    entries = []
    for number, size in COCO_SIZES.items():
        name = f"{number:012d}.jpg"
        picture(directory / name, size, number)
        entries.append(
            {
                "license": 1,
                "file_name": name,
                "coco_url": f"http://images.example.org/{name}",
                "height": size[1],
                "width": size[0],
                "date_captured": "2013-11-14 17:02:52",
                "id": number,
            }
        )
    return entries


def coco_instances(directory: Path) -> Path:
    """COCO instances: a dog in three images, two cats in one, a crowd of people, and an image without objects."""
    boxes = [
        (1, 18, [8.0, 6.0, 16.0, 12.0], 0),
        (1, 17, [0.0, 0.0, 20.0, 20.0], 0),
        (1, 17, [30.0, 10.0, 20.0, 20.5], 0),
        (2, 18, [12.0, 16.0, 24.0, 32.0], 0),
        (3, 1, [0.0, 0.0, 40.0, 40.0], 1),
        (4, 18, [0.0, 0.0, 64.0, 32.0], 0),
    ]
    annotations = [
        {
            "segmentation": {"counts": [], "size": [1, 1]} if crowd else [[1.0, 1.0, 2.0, 2.0, 3.0, 1.0]],
            "area": box[2] * box[3],
            "iscrowd": crowd,
            "image_id": image,
            "bbox": box,
            "category_id": category,
            "id": 100 + index,
        }
        for index, (image, category, box, crowd) in enumerate(boxes)
    ]
    categories = [
        {"supercategory": "person", "id": 1, "name": "person"},
        {"supercategory": "animal", "id": 17, "name": "cat"},
        {"supercategory": "animal", "id": 18, "name": "dog"},
    ]
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "CC BY 4.0", "url": "http://example.org"}],
        "images": _coco_images(directory),
        "annotations": annotations,
        "categories": categories,
    }
    save(directory / "instances_val2017.json", content)
    return directory


def coco_captions(directory: Path) -> Path:
    """COCO captions: two of the first image, one each of three others."""
    captions = [
        (1, "A dog sits between two cats."),
        (1, "Three animals on a couch."),
        (2, "A dog that stands upright."),
        (3, "A crowd in front of a stage."),
        (4, "A wide dog.\n"),
    ]
    content = {
        "info": {"year": 2017},
        "images": _coco_images(directory),
        "licenses": [],
        "annotations": [
            {"image_id": image, "id": 500 + index, "caption": text} for index, (image, text) in enumerate(captions)
        ],
    }
    save(directory / "captions_val2017.json", content)
    return directory


SETS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "coco": ("coco", coco_instances),
    "coco-captions": ("coco", coco_captions),
}
"""Kind of the converter, and what writes the set into a directory."""
