"""Data sets of five records in the forms in which others publish them, with content of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

needs_pydicom = pytest.mark.skipif(
    find_spec("pydicom") is None, reason="pydicom is not installed; the dev extra has it"
)


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


def _result(kind: str, value: dict[str, Any], name: str = "label") -> dict[str, Any]:
    size = {"original_width": 60, "original_height": 40, "image_rotation": 0}
    return {
        "id": "x1",
        "type": kind,
        "from_name": name,
        "to_name": "image",
        "origin": "manual",
        "value": value,
        **size,
    }


def _shape(label: str, x: float, y: float, width: float, height: float, rotation: float = 0) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": [label]}
    return _result("rectanglelabels", value)


def _annotation(results: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    base = {"id": 7, "completed_by": 1, "was_cancelled": False, "ground_truth": False, "lead_time": 4.2}
    return {**base, "result": results, **fields}


def labelstudio(directory: Path) -> Path:
    """Label Studio JSON: two annotations, a canceled one, a rotated box, choices, a text, and a polygon."""
    for index in range(5):
        picture(directory / f"scan {index}.png", (60, 40), index)

    points = {"points": [[1, 1], [50, 1], [50, 50]], "closed": True, "polygonlabels": ["stain"]}
    annotations = [
        [_annotation([_shape("crack", 50, 25, 25, 50)]), _annotation([_shape("stain", 0, 0, 10, 10)])],
        [
            _annotation([_shape("crack", 0, 0, 10, 10)], was_cancelled=True),
            _annotation([_shape("stain", 10, 10, 20, 20)]),
        ],
        [_annotation([_shape("crack", 10, 10, 20, 20, rotation=30.0)])],
        [_annotation([_result("choices", {"choices": ["broken", "dirty"]}, "state")])],
        [
            _annotation(
                [_result("textarea", {"text": ["Two screws are loose."]}, "remark"), _result("polygonlabels", points)]
            )
        ],
    ]
    locations = [
        "/data/upload/1/1a2b3c4d-scan%200.png",
        "s3://bucket/some/where/scan 1.png",
        "/data/local-files/?d=scan%202.png",
        "https://example.org/scan%203.png?token=1",
        "scan 4.png",
    ]
    tasks = [
        {
            "id": 11 + index,
            "annotations": annotations[index],
            "drafts": [],
            "predictions": [],
            "data": {"image": locations[index]} | ({"question": "What is wrong?"} if index == 4 else {}),
            "meta": {},
            "created_at": "2026-01-02T03:04:05Z",
            "project": 1,
        }
        for index in range(5)
    ]
    save(directory / "project-1-at-2026-01-02.json", tasks)
    return directory


def visual_genome(directory: Path) -> Path:
    """Visual Genome: two questions on each of two images, and three regions of one, two with the same phrase."""
    for number, folder in ((1, "VG_100K"), (2, "VG_100K_2")):
        picture(directory / folder / f"{number}.jpg", (80, 60), number)
    questions = [
        {
            "qa_id": 986768 + index,
            "image_id": image,
            "question": question,
            "answer": answer,
            "a_objects": [],
            "q_objects": [],
        }
        for index, (image, question, answer) in enumerate(
            [
                (1, "What color is the clock?", "Green."),
                (1, "Where is the man?", "On the street."),
                (2, "Who sits?", "A cat."),
            ]
        )
    ]
    save(
        directory / "question_answers.json",
        [{"id": image, "qas": [qa for qa in questions if qa["image_id"] == image]} for image in (1, 2)],
    )
    regions = [
        {"region_id": 1382 + index, "width": width, "height": height, "image_id": 1, "phrase": phrase, "y": y, "x": x}
        for index, (x, y, width, height, phrase) in enumerate(
            [
                (40, 30, 20, 15, "the clock is green"),
                (0, 0, 8, 60, "a tree"),
                (8, 8, 8, 8, "a man"),
                (9, 9, 9, 9, "a man"),
            ]
        )
    ]
    save(directory / "region_descriptions.json", [{"id": 1, "regions": regions}])
    return directory


def rsvqa(directory: Path) -> Path:
    """RSVQA: five questions in three files, one of them inactive, on two TIFF images."""
    for number in (0, 1):
        picture(directory / "Images_LR" / f"{number}.tif", (32, 32), number)
    common = {"people_id": 0, "date_added": 1577.5}
    asked = [
        (0, "presence", "Is a road present?", "yes"),
        (0, "count", "How many buildings are there?", "3"),
        (1, "comp", "Are there more roads than buildings?", "no"),
        (1, "rural_urban", "Is it a rural or an urban area?", "rural"),
    ]
    questions: list[dict[str, Any]] = [
        {"id": index, "img_id": image, "type": kind, "question": text, "answers_ids": [100 + index], "active": True}
        | common
        for index, (image, kind, text, _) in enumerate(asked)
    ]
    answers: list[dict[str, Any]] = [
        {"id": 100 + index, "question_id": index, "answer": answer, "active": True} | common
        for index, (*_, answer) in enumerate(asked)
    ]
    images = [
        {
            "id": image,
            "questions_ids": [2 * image, 2 * image + 1],
            "sensor": "s2",
            "original_name": f"{image}",
            "active": True,
        }
        for image in (0, 1)
    ]
    inactive = {"id": 4, "active": False}
    for name, entries in (("questions", questions), ("answers", answers), ("images", images)):
        save(directory / f"LR_split_train_{name}.json", {name: [*entries, inactive]})
        save(directory / f"all_{name}.json", {name: [*entries, inactive]})
    return directory


def r2gen(directory: Path) -> Path:
    """R2Gen: five studies in three splits, those of IU X-Ray with two views."""
    for study in range(5):
        for view in (0, 1):
            picture(directory / "images" / f"CXR{study}_IM-0001" / f"{view}.png", (30, 40), 2 * study + view)
    reports = [
        {
            "id": f"CXR{study}_IM-0001",
            "report": f"The heart is of normal size {study} .",
            "image_path": [f"CXR{study}_IM-0001/0.png", f"CXR{study}_IM-0001/1.png"],
            "split": split,
        }
        for study, split in enumerate(["train", "train", "train", "val", "test"])
    ]
    reports[0] |= {"study_id": 50414267, "subject_id": 10000032}
    splits = {split: [entry for entry in reports if entry["split"] == split] for split in ("train", "val", "test")}
    save(directory / "annotation.json", splits)
    return directory


def cvat(directory: Path) -> Path:
    """CVAT for images 1.1: boxes, one of them rotated, a polygon, a tag, and an image without shapes."""
    for number in range(5):
        picture(directory / "images" / f"part_{number}.png", (50, 40), number)
    shapes = [
        '<box label="screw" source="manual" occluded="0" xtl="10.00" ytl="10.00" xbr="20.00" ybr="30.00" z_order="0">'
        '<attribute name="state">loose</attribute></box>',
        '<box label="screw" source="manual" occluded="0" rotation="12.5" xtl="1" ytl="1" xbr="9" ybr="9"></box>',
        '<polygon label="plate" source="manual" occluded="0" points="1.0,1.0;40.0,1.0;40.0,30.0"></polygon>',
        '<tag label="broken" source="manual"></tag>',
        "",
    ]
    images = "".join(
        f'<image id="{index}" name="part_{index}.png" width="50" height="40">{shape}</image>'
        for index, shape in enumerate(shapes)
    )
    meta = "<meta><task><id>1</id><name>parts</name><size>5</size><mode>annotation</mode></task></meta>"
    text = f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{meta}{images}</annotations>'
    (directory / "annotations.xml").write_text(text, encoding="utf-8")
    return directory


def _write_dicom(directory: Path, name: str, values: np.ndarray[Any, Any], **tags: Any) -> None:
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = tags["SOPInstanceUID"]
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = FileDataset(str(path), Dataset(), file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns = values.shape
    common = {"SamplesPerPixel": 1, "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0}
    named = {"PatientName": "Muster^Erika", "PatientBirthDate": "19700101", "InstitutionName": "Clinic"}
    for tag, value in {**common, **named, "PhotometricInterpretation": "MONOCHROME2", **tags}.items():
        setattr(data, tag, value)
    data.PixelData = values.astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


def dicom(directory: Path) -> Path:
    """DICOM: a chest radiograph, a CT of three slices of the same patient, and an inverted one of another."""
    write = partial(_write_dicom, directory)
    ramp = np.arange(48, dtype=np.uint16).reshape(6, 8)
    radiograph = {
        "PatientID": "P-77",
        "AccessionNumber": "A1",
        "StudyInstanceUID": "1.2.1",
        "SeriesInstanceUID": "1.2.1.1",
    }
    write(
        "P-77/a/IMG0001.dcm", ramp * 80, SOPInstanceUID="1.2.1.1.1", WindowCenter=2000, WindowWidth=2001, **radiograph
    )
    series = {"PatientID": "P-77", "AccessionNumber": "A2", "StudyInstanceUID": "1.2.2", "SeriesInstanceUID": "1.2.2.1"}
    for number in (1, 2, 3):
        write(
            f"P-77/b/IMG{number:04d}.dcm",
            ramp + 1000 * number,
            SOPInstanceUID=f"1.2.2.1.{number}",
            SeriesNumber=1,
            InstanceNumber=4 - number,
            RescaleSlope=1,
            RescaleIntercept=-1024,
            WindowCenter=[1000, 40],
            WindowWidth=[101, 400],
            **series,
        )
    other = {"PatientID": "P-78", "AccessionNumber": "A3", "StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.1"}
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "SOPInstanceUID": "1.2.3.1.1"}
    write("P-78/IMG0001.dcm", ramp * 80, **inverted, **other)
    table = "accession;report\nA1;No finding.\nA2;A nodule in the left lung.\nA3;Cardiomegaly.\n"
    (directory / "reports.csv").write_text(table, encoding="utf-8")
    return directory


SETS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "coco": ("coco", coco_instances),
    "coco-captions": ("coco", coco_captions),
    "labelstudio": ("labelstudio", labelstudio),
    "visual-genome": ("visual-genome", visual_genome),
    "rsvqa": ("rsvqa", rsvqa),
    "r2gen": ("r2gen", r2gen),
    "cvat": ("cvat", cvat),
    "dicom": ("dicom", dicom),
}
"""Kind of the converter, and what writes the set into a directory."""
