"""Five records of every published form, converted to the last character; what all converters have in common."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from lora_llava.cli import cli
from lora_llava.data.convert.run import KINDS, convert
from lora_llava.data.convert.writer import ConvertOptions
from lora_llava.data.images.read import image_problem
from lora_llava.data.load import load_records
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from tests.helpers.published_sets import SETS, needs_pydicom

NAMES = [pytest.param(name, marks=needs_pydicom if name == "dicom" else ()) for name in SETS]
SHORT = "\nAnswer the question using a single word or phrase."
WHERE = "Please provide the bounding box coordinate of the region this sentence describes: "


def options_of(name: str, source: Path, **more: Any) -> ConvertOptions:
    own: dict[str, Any] = {
        "labelstudio": {"question": "What is the {name}?"},
        "dicom": {"table": source / "reports.csv"},
    }.get(name, {})
    return ConvertOptions(**own, **more)


def converted(name: str, directory: Path, **more: Any) -> tuple[dict[str, Any], Path]:
    kind, make = SETS[name]
    source = directory / "in"
    if not source.exists():
        source.mkdir(parents=True)
        make(source)
    return convert(kind, source, directory / "out", options_of(name, source, **more)), directory / "out"


def rows(path: Path) -> list[tuple[str, str, str, str]]:
    """Return image, question, answer and type of each record."""
    made = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        human, model = row["conversations"]
        assert (human["from"], model["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n")
        made.append((row["image"], human["value"].removeprefix("<image>\n"), model["value"], row["type"]))
    return made


def state(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_converter_has_a_set() -> None:
    assert {kind for kind, _ in SETS.values()} == set(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_read_by_the_kit_and_images_are_below_the_output(tmp_path: Path, name: str) -> None:
    report, output = converted(name, tmp_path)
    before = state(output)
    assert report["records"]
    for file, count in report["records"].items():
        records = load_records(DataSettings(path=str(output / file)))
        assert len(records) == count
        assert len({record.id for record in records}) == count
        for record in records:
            assert record.image is not None and record.image.path is not None
            assert record.image.path.is_relative_to(output / "images")
            assert image_problem(record.image) is None
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert json.loads(before["report.json"])["records"] == report["records"]
    # The same input, options and seed: the same bytes.
    (tmp_path / "out").rename(tmp_path / "first")
    converted(name, tmp_path)
    assert state(tmp_path / "out") == before


@pytest.mark.parametrize("name", NAMES)
def test_check_takes_what_was_converted(tmp_path: Path, tiny_base: Path, name: str) -> None:
    report, output = converted(name, tmp_path)
    data = {"path": str(output / next(iter(report["records"]))), **({"group": "group"} if report["grouped"] else {})}
    recipe = {
        "version": 1,
        "name": "x",
        "output_dir": str(tmp_path / "run"),
        "base": {"model_name_or_path": str(tiny_base)},
        "stages": {"instruct": {"data": data}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = CliRunner().invoke(cli, ["check", str(tmp_path / "recipe.yaml"), "--workers", "1"])
    assert done.exit_code == 0, done.output


def documented() -> dict[str, tuple[str, str]]:
    """Return command and result of each row in docs/data_forms.md, by the set."""
    text = (Path(__file__).parents[4] / "docs/data_forms.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `([a-z0-9-]+)` \| `(convert [^|]+)` \| ([^|]+) \|$", text, re.MULTILINE)
    return {name: (command, result) for name, command, result in rows}


def test_every_set_is_documented() -> None:
    assert list(documented()) == list(SETS)


@pytest.mark.parametrize("name", NAMES)
def test_the_documented_command_writes_what_is_documented(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    SETS[name][1](tmp_path / "in")
    command, result = documented()[name]
    args = shlex.split(command.replace("SRC", str(tmp_path / "in")).replace("DST", str(tmp_path / "out")))
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert f"{sum(report['records'].values())}: {', '.join(report['types'])}" == result


def test_label_studio(tmp_path: Path) -> None:
    report, output = converted("labelstudio", tmp_path, per_image=9)
    made = rows(output / "records.jsonl")
    images = [f"images/scan {index}.png" for index in range(5)]
    assert made[:2] == [
        (images[3], "What is the state?", "broken, dirty", "choices"),
        (images[4], "What is wrong?", "Two screws are loose.", "textarea"),
    ]
    # 50, 25, 25 and 50 percent of 60 x 40 are (30, 10, 45, 30), ten rows lower on the square.
    assert [row for row in made if row[3] == "where"] == [
        (images[0], f"{WHERE}crack", "[0.50, 0.33, 0.75, 0.67]", "where"),
        (images[1], f"{WHERE}stain", "[0.10, 0.23, 0.30, 0.37]", "where"),
    ]
    assert [row[1:3] for row in made if row[3] == "count"] == [
        (f'How many objects of the class "crack" are in the image?{SHORT}', "1"),
        (f'How many objects of the class "stain" are in the image?{SHORT}', "1"),
    ]
    there = {("crack", 0), ("crack", 2), ("stain", 1), ("stain", 4)}
    presence = {
        (label, index): answer
        for image, question, answer, kind in made
        if kind == "presence"
        for label in ("crack", "stain")
        for index in range(5)
        if image == images[index] and question == f"Is there a {label} in the image?{SHORT}"
    }
    assert len(presence) == 8
    assert {key for key, answer in presence.items() if answer == "Yes"} == there
    assert {dropped["reason"]: dropped["count"] for dropped in report["dropped"]} == {
        "a further annotation of a task": 1,
        "a box is rotated": 1,
        "a shape that is not a box": 1,
    }


def test_label_studio_asks_for_a_question(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    SETS["labelstudio"][1](source)
    report = convert("labelstudio", source, tmp_path / "out", ConvertOptions())
    [said] = next(one["examples"] for one in report["dropped"] if one["reason"] == "an answer without a question")
    assert said.endswith("give one with --question, in which {name} stands for 'state'")


def test_answers_of_one_control_have_different_ids(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    SETS["labelstudio"][1](source)
    [path] = source.glob("*.json")
    tasks = json.loads(path.read_text(encoding="utf-8"))
    answered = next(task for task in tasks if task["annotations"][0]["result"][0]["type"] == "textarea")
    [annotation] = answered["annotations"]
    annotation["result"] = [annotation["result"][0]] * 2
    path.write_text(json.dumps(tasks), encoding="utf-8")
    _, output = converted("labelstudio", tmp_path)
    text = (output / "records.jsonl").read_text(encoding="utf-8")
    ids = [row["id"] for line in text.splitlines() if (row := json.loads(line))["type"] == "textarea"]
    assert len(ids) == 2
    assert ids[1] == f"{ids[0]}/2"


def test_visual_genome(tmp_path: Path) -> None:
    _, output = converted("visual-genome", tmp_path)
    made = rows(output / "records.jsonl")
    one, two = "images/VG_100K/1.jpg", "images/VG_100K_2/2.jpg"
    assert made[:3] == [
        (one, "What color is the clock?", "Green.", "qa"),
        (one, "Where is the man?", "On the street.", "qa"),
        (two, "Who sits?", "A cat.", "qa"),
    ]
    # 80 x 60: ten rows above. "a man" occurs twice, so its box is not asked for.
    boxes = {"the clock is green": "[0.50, 0.50, 0.75, 0.69]", "a tree": "[0.00, 0.12, 0.10, 0.88]"}
    [(_, asked, box, kind), (_, question, phrase, other)] = made[3:]
    assert (kind, other) == ("where", "region")
    assert boxes[asked.removeprefix(WHERE)] == box
    assert question == f"Please provide a short description for this region: {boxes[phrase]}"


def test_rsvqa(tmp_path: Path) -> None:
    report, output = converted("rsvqa", tmp_path)
    assert rows(output / "train.jsonl") == [
        ("images/Images_LR/0.png", f"Is a road present?{SHORT}", "yes", "presence"),
        ("images/Images_LR/0.png", f"How many buildings are there?{SHORT}", "3", "count"),
        ("images/Images_LR/1.png", f"Are there more roads than buildings?{SHORT}", "no", "comp"),
        ("images/Images_LR/1.png", f"Is it a rural or an urban area?{SHORT}", "rural", "rural_urban"),
    ]
    # Files that repeat all splits are not read with them.
    assert report["records"] == {"train.jsonl": 4}
    assert report["dropped"][0]["examples"] == ["LR_split_train_questions.json, questions[4]: is inactive"]


def test_rsvqa_takes_the_first_active_answer(tmp_path: Path) -> None:
    _, output = converted("rsvqa", tmp_path)
    path = tmp_path / "in" / "LR_split_train_answers.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["answers"][0]["active"] = False
    path.write_text(json.dumps(content), encoding="utf-8")
    questions = tmp_path / "in" / "LR_split_train_questions.json"
    content = json.loads(questions.read_text(encoding="utf-8"))
    content["questions"][0]["answers_ids"] = [100, 103]
    questions.write_text(json.dumps(content), encoding="utf-8")
    output.rename(tmp_path / "first")
    converted("rsvqa", tmp_path)
    assert rows(output / "train.jsonl")[0][2] == "rural"


def test_r2gen(tmp_path: Path) -> None:
    report, output = converted("r2gen", tmp_path)
    asked = "Write the radiology report of this image."
    made = {file: rows(output / file) for file in report["records"]}
    assert made == {
        f"{split}.jsonl": [
            (f"images/CXR{study}_IM-0001/0.png", asked, f"The heart is of normal size {study} .", "report")
            for study in studies
        ]
        for split, studies in (("train", (0, 1, 2)), ("val", (3,)), ("test", (4,)))
    }
    groups = [json.loads(line)["group"] for line in (output / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert groups == ["10000032", "CXR1_IM-0001", "CXR2_IM-0001"]
    assert report["dropped"] == [
        {
            "reason": "a further view of a study",
            "count": 5,
            "examples": [
                f"annotation.json, {split}[{index}]: image_path[1]: one view is taken"
                for split, index in (("train", 0), ("train", 1), ("train", 2), ("val", 0), ("test", 0))
            ],
        }
    ]


def test_cvat(tmp_path: Path) -> None:
    report, output = converted("cvat", tmp_path, per_image=9)
    made = rows(output / "records.jsonl")
    assert [row for row in made if row[3] != "presence"] == [
        ("images/part_0.png", f'How many objects of the class "screw" are in the image?{SHORT}', "1", "count"),
        # 50 x 40: five rows above.
        ("images/part_0.png", f"{WHERE}screw", "[0.20, 0.30, 0.40, 0.70]", "where"),
    ]
    presence = [row for row in made if row[3] == "presence"]
    assert sorted(row[2] for row in presence) == ["No"] * 4 + ["Yes"] * 4
    assert {(Path(row[0]).stem, row[1]) for row in presence if row[2] == "Yes"} == {
        ("part_0", f"Is there a screw in the image?{SHORT}"),
        ("part_1", f"Is there a screw in the image?{SHORT}"),
        ("part_2", f"Is there a plate in the image?{SHORT}"),
        ("part_3", f'Does "broken" apply to the image?{SHORT}'),
    }
    assert [one["examples"] for one in report["dropped"]] == [
        ["annotations.xml, image 1, box 1: rotation: a rotated box has no two corners"],
        ["annotations.xml, image 2, polygon 1: is no box"],
    ]


LAUGHS = '<!DOCTYPE a [<!ENTITY l "lol"><!ENTITY m "&l;&l;&l;&l;&l;&l;&l;&l;">]><annotations><a>&m;</a></annotations>'
SECRET = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotations>&x;</annotations>'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "has a document type (<!DOCTYPE>), which CVAT does not write; remove it"),
        (SECRET, "has a document type (<!DOCTYPE>), which CVAT does not write; remove it"),
        ("<annotations>&l;</annotations>", "not valid XML: undefined entity"),
        ("<annotations><track/></annotations>", "is of CVAT for video; export it as CVAT for images 1.1"),
        ("<data/>", "begins with <data>, must begin with <annotations>"),
        ("<annotations>", "line 1: not valid XML: no element found"),
        ("<annotations>" + "<a>" * 60, "is nested deeper than 50 elements"),
        ('<?xml version="1.0" encoding="nonsense"?><annotations/>', "a.xml"),
        ("<annotations/>", "nothing could be converted. It holds no records"),
    ],
)  # fmt: skip
def test_xml_is_read_without_entities(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.xml").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        convert("cvat", tmp_path / "a.xml", tmp_path / "out", ConvertOptions())
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def changed_json(name: str, directory: Path, file: str, change: Any) -> dict[str, Any]:
    """Convert a set after a change to the content of one file."""
    source = directory / "in"
    source.mkdir()
    SETS[name][1](source)
    path = source / file
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return converted(name, directory)[0]


LABELS, REGIONS = "project-1-at-2026-01-02.json", "region_descriptions.json"
ASKED, REPORTS = "LR_split_train_questions.json", "annotation.json"


def first_result(content: Any) -> Any:
    return content[0]["annotations"][0]["result"][0]


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("labelstudio", LABELS, lambda c: c[0].pop("data"), "{}[0]: data: is missing"),
        ("labelstudio", LABELS, lambda c: c[0]["data"].update(image="x/a.png"), "{}[0]: data: image: x/a.png is not"),
        ("labelstudio", LABELS, lambda c: c[0].update(annotations=[]), "{}[0]: annotations: holds none that is"),
        ("labelstudio", LABELS, lambda c: first_result(c)["value"].update(x=90), "outside of the image"),
        ("labelstudio", LABELS, lambda c: first_result(c).update(original_width=61), "of 61 x 40 pixels"),
        ("labelstudio", LABELS, lambda c: first_result(c).update(type="brush"), "type: brush has no labels"),
        ("visual-genome", REGIONS, lambda c: c[0].update(id=9), "{}[0]: image: '9.jpg' is missing"),
        ("visual-genome", REGIONS, lambda c: c[0].pop("regions"), "{}[0]: has neither a list of qas nor of regions"),
        ("visual-genome", REGIONS, lambda c: c[0]["regions"][0].update(x=79), "[0]: regions[0]: box: is (79, 30, 99,"),
        ("visual-genome", REGIONS, lambda c: c[0]["regions"][0].pop("phrase"), "{}[0]: regions[0]: phrase: is missing"),
        ("rsvqa", ASKED, lambda c: c["questions"][0].update(img_id=8), "{}, questions[0]: img_id: 8 is not in the"),
        ("rsvqa", ASKED, lambda c: c["questions"][0].update(answers_ids=[8]), "answers_ids: 8 is not in the file of"),
        ("rsvqa", ASKED, lambda c: c["questions"][0].update(answers_ids=[]), "answers_ids: must be a list of ids"),
        ("rsvqa", ASKED, lambda c: c["questions"][0].update(question=" "), "{}, questions[0]: question: is empty"),
        ("r2gen", REPORTS, lambda c: c["train"][0].update(report=""), "{}, train[0]: report: is empty"),
        ("r2gen", REPORTS, lambda c: c["train"][0].update(image_path=[]), "{}, train[0]: image_path: must be a list"),
        ("r2gen", REPORTS, lambda c: c["train"][0].update(image_path=["/etc/x"]), "{}, train[0]: image: '/etc/x' must"),
        ("r2gen", REPORTS, lambda c: c["train"][0].update(id=True), "{}, train[0]: id: is"),
    ],
)  # fmt: skip
def test_a_fault_is_named_by_file_record_and_field(
    tmp_path: Path, name: str, file: str, change: Any, said: str
) -> None:
    report = changed_json(name, tmp_path, file, change)
    examples = [example for dropped in report["dropped"] for example in dropped["examples"]]
    assert any(said.replace("{}", file) in example for example in examples), examples


@pytest.mark.parametrize(
    ("kind", "file", "text", "said"),
    [
        ("labelstudio", "a.json", "{}", "a.json: holds an object, must hold a list of tasks"),
        ("labelstudio", "a.json", "[", "a.json: line 1, column 2: not valid JSON"),
        ("visual-genome", "b.json", "[]", "holds none of question_answers.json and region_descriptions.json"),
        ("visual-genome", "question_answers.json", "{}", "question_answers.json: holds an object, must hold a list"),
        ("rsvqa", "a.json", "{}", "holds no file *questions.json"),
        ("rsvqa", "LR_questions.json", "{}", "LR_images.json cannot be read: No such file"),
        ("r2gen", "annotation.json", "[]", "must hold an object with train, val and test"),
        ("r2gen", "annotation.json", '{"a/b": []}', "'a/b': is no split"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, kind: str, file: str, text: str, said: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / file).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        convert(kind, tmp_path / "in", tmp_path / "out", ConvertOptions())
    assert said in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    SETS["r2gen"][1](source)
    done = CliRunner().invoke(cli, ["convert", "r2gen", str(source), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "train.jsonl: 3 records" in said
    assert "rule: View: the first of image_path" in said
    assert "left out: 5 x a further view of a study; the first: annotation.json, train[0]: image_path[1]" in said
    assert f"In a recipe: data: {{path: {tmp_path / 'out' / 'train.jsonl'}, group: group}}" in said
    again = CliRunner().invoke(cli, ["convert", "r2gen", str(source), str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "already exists" in again.output
