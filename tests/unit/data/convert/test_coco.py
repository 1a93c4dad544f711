"""COCO: questions about objects from instances, records from captions, and faults by their names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_llava.data.convert.run import convert
from lora_llava.data.convert.writer import ConvertOptions
from lora_llava.errors import ArtifactError, DataError
from tests.helpers.published_sets import coco_captions, coco_instances, picture, save

SHORT = "\nAnswer the question using a single word or phrase."
WHERE = "Please provide the bounding box coordinate of the region this sentence describes: "


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(path: Path, kind: str) -> dict[tuple[str, str], str]:
    """Return answers by image and question, without the placeholder."""
    return {
        (row["image"], row["conversations"][0]["value"].removeprefix("<image>\n")): row["conversations"][1]["value"]
        for row in rows(path)
        if row["type"] == kind
    }


def run(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return convert("coco", source, output, ConvertOptions(**options))


def test_instances_become_counts_and_boxes_on_the_padded_square(tmp_path: Path) -> None:
    report = run(coco_instances(tmp_path / "in"), tmp_path / "out")
    records = tmp_path / "out" / "records.jsonl"
    one, two, four = ("images/000000000001.jpg", "images/000000000002.jpg", "images/000000000004.jpg")
    assert asked(records, "count") == {
        (one, f'How many objects of the class "cat" are in the image?{SHORT}'): "2",
        (one, f'How many objects of the class "dog" are in the image?{SHORT}'): "1",
        (two, f'How many objects of the class "dog" are in the image?{SHORT}'): "1",
        (four, f'How many objects of the class "dog" are in the image?{SHORT}'): "1",
    }
    # 64 x 48 gets 8 rows above: (8, 6, 24, 18) is (8, 14, 24, 26) of 64; 48 x 64 gets 8 columns on the left.
    assert asked(records, "where") == {
        (one, f"{WHERE}dog"): "[0.12, 0.22, 0.38, 0.41]",
        (two, f"{WHERE}dog"): "[0.31, 0.25, 0.69, 0.75]",
        (four, f"{WHERE}dog"): "[0.00, 0.25, 1.00, 0.75]",
    }
    assert report["images"] == {"linked": 5}
    assert report["dropped"] == []


def test_presence_is_balanced_for_each_label_and_true(tmp_path: Path) -> None:
    run(coco_instances(tmp_path / "in"), tmp_path / "out")
    presence = asked(tmp_path / "out" / "records.jsonl", "presence")
    there = {"person": {3}, "cat": {1}, "dog": {1, 2, 4}}
    answers: dict[str, Counter[str]] = {}
    for (image, question), answer in presence.items():
        label = question.removeprefix("Is there a ").removesuffix(f" in the image?{SHORT}")
        assert answer == ("Yes" if int(Path(image).stem) in there[label] else "No")
        answers.setdefault(label, Counter())[answer] += 1
    # Only two images are without a dog.
    assert answers == {
        label: Counter(Yes=number, No=number) for label, number in (("person", 1), ("cat", 1), ("dog", 2))
    }


def test_captions_get_different_requests_and_know_each_other(tmp_path: Path) -> None:
    report = run(coco_captions(tmp_path / "in"), tmp_path / "out")
    made = rows(tmp_path / "out" / "records.jsonl")
    assert [row["conversations"][1]["value"] for row in made] == [
        "A dog sits between two cats.",
        "Three animals on a couch.",
        "A dog that stands upright.",
        "A crowd in front of a stage.",
        "A wide dog.",
    ]
    assert (
        made[0]["references"] == made[1]["references"] == ["A dog sits between two cats.", "Three animals on a couch."]
    )
    assert "references" not in made[2]
    assert made[0]["conversations"][0] != made[1]["conversations"][0]
    assert report["types"] == {"caption": 5}


def test_the_same_seed_gives_the_same_files_another_one_others(tmp_path: Path) -> None:
    source = coco_captions(tmp_path / "in")
    texts = []
    for index, seed in enumerate((0, 0, 1)):
        run(source, tmp_path / str(index), seed=seed)
        texts.append((tmp_path / str(index) / "records.jsonl").read_bytes())
        assert json.loads((tmp_path / str(index) / "report.json").read_text(encoding="utf-8"))["seed"] == seed
    assert texts[0] == texts[1] != texts[2]


def test_an_export_by_splits_keeps_them(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        coco_instances(tmp_path / "in" / split)
        (tmp_path / "in" / split / "instances_val2017.json").rename(tmp_path / "in" / split / "_annotations.coco.json")
    report = run(tmp_path / "in", tmp_path / "out")
    assert set(report["records"]) == {"train.jsonl", "valid.jsonl"}
    assert {row["image"].split("/")[1] for row in rows(tmp_path / "out" / "valid.jsonl")} == {"valid"}


def changed(directory: Path, key: str, index: int, **fields: Any) -> Path:
    source = coco_instances(directory)
    path = source / "instances_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content[key][index] |= fields
    save(path, content)
    return source


@pytest.mark.parametrize(
    ("key", "index", "fields", "said"),
    [
        ("annotations", 0, {"image_id": 99}, "annotations[0]: image_id: 99 is no image of the file"),
        ("annotations", 0, {"category_id": 99}, "annotations[0]: category_id: 99 is no category of the file"),
        ("annotations", 0, {"bbox": [60, 6, 16, 12]}, "annotations[0]: bbox: is (60, 6, 76, 18), outside of the image"),
        ("annotations", 0, {"bbox": [8, 6, 0, 12]}, "annotations[0]: bbox: is (8, 6, 8, 18): its right and"),
        ("annotations", 0, {"bbox": [8, 6, 16]}, "annotations[0]: bbox: must be a list of x, y, width and height"),
        ("annotations", 0, {"bbox": [8, 6, "16", 12]}, "annotations[0]: bbox[2]: is text, must be a number"),
        ("annotations", 0, {"bbox": [8, 6, 10**400, 12]}, "annotations[0]: bbox[2]: is no number of pixels"),
        ("annotations", 0, {"bbox": [8.2, 6, 0.1, 12]}, "narrower than a hundredth"),
        ("images", 0, {"file_name": "missing.jpg"}, "images[0]: image: 'missing.jpg' is missing"),
        ("images", 0, {"file_name": "../secret.jpg"}, "images[0]: image: '../secret.jpg' must be relative to"),
        ("images", 0, {"file_name": 5}, "images[0]: file_name: is a number, must be text"),
        ("images", 1, {"id": 1}, "images[1]: id: 1 occurs twice"),
        ("images", 1, {"id": ""}, "images[1]: id: is empty, must be a string or an integer"),
        ("images", 0, {"width": 640, "height": 480}, "of an image of 640 x 480 pixels, the file has 64 x 48"),
        ("categories", 0, {"name": "<image>"}, "holds <image>"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_file_record_and_field(
    tmp_path: Path, key: str, index: int, fields: dict[str, Any], said: str
) -> None:
    report = run(changed(tmp_path / "in", key, index, **fields), tmp_path / "out")
    examples = [example for dropped in report["dropped"] for example in dropped["examples"]]
    assert any(said in example for example in examples), examples
    assert all(example.startswith(("instances_val2017.json, ", "record ")) for example in examples)


def test_an_image_that_is_reported_is_left_out(tmp_path: Path) -> None:
    report = run(changed(tmp_path / "in", "images", 0, width="64"), tmp_path / "out")
    reasons = {dropped["reason"]: dropped["examples"] for dropped in report["dropped"]}
    [said] = reasons["a field is missing or of the wrong type"]
    assert said.endswith("images[0]: width: is text, must be a number")
    assert "images/000000000001.jpg" not in {row["image"] for row in rows(tmp_path / "out" / "records.jsonl")}
    assert len(reasons["an annotation belongs to no image"]) == 3


def test_boxes_of_an_image_that_exif_data_rotate_are_left_out(tmp_path: Path) -> None:
    source = coco_instances(tmp_path / "in")
    path = source / "000000000004.jpg"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)
    report = run(source, tmp_path / "out")
    assert [dropped["reason"] for dropped in report["dropped"]] == ["boxes in an image that EXIF data rotate"]
    assert len(asked(tmp_path / "out" / "records.jsonl", "where")) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "holds a list of 0, must hold an object with images"),
        ({"images": []}, "annotations: is missing, must be a list; the file has images"),
        ({"images": [], "annotations": []}, "nothing could be converted. It holds no records"),
        ({"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}, "1 problem: the first is a.json, images[0]"),
    ],
)
def test_a_file_without_anything_to_convert_leaves_nothing(tmp_path: Path, content: Any, said: str) -> None:
    source = save(tmp_path / "in" / "a.json", content)
    with pytest.raises(DataError, match=said.replace("[", r"\[")):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nothing_is_overwritten_and_a_directory_must_have_one_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="already exists"):
        run(coco_instances(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(DataError, match=r"holds no file \*\.json"):
        run(tmp_path / "out", tmp_path / "other")
    coco_captions(tmp_path / "in")
    with pytest.raises(DataError, match=r"holds 2 files \*\.json \(captions_val2017.json, instances"):
        run(tmp_path / "in", tmp_path / "other")
    with pytest.raises(DataError, match="there is no such file"):
        run(tmp_path / "nowhere", tmp_path / "other")


def test_a_link_out_of_the_images_is_not_followed(tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret.png", (64, 48))
    source = coco_instances(tmp_path / "in")
    (source / "000000000001.jpg").unlink()
    (source / "000000000001.jpg").symlink_to(secret)
    report = run(source, tmp_path / "out")
    assert report["dropped"][0]["reason"] in ("an image path is not allowed", "an annotation belongs to no image")
    assert not (tmp_path / "out" / "images" / "000000000001.jpg").exists()


def test_a_tiff_that_is_rotated_gives_no_boxes_either(tmp_path: Path) -> None:
    source = coco_instances(tmp_path / "in")
    [path] = source.glob("*.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    [image] = [one for one in document["images"] if one["file_name"] == "000000000004.jpg"]
    image["file_name"] = "4.tif"
    Image.open(source / "000000000004.jpg").save(source / "4.tif", tiffinfo={0x0112: 3})
    path.write_text(json.dumps(document), encoding="utf-8")
    report = run(source, tmp_path / "out")
    assert [dropped["reason"] for dropped in report["dropped"]] == ["boxes in an image that EXIF data rotate"]
