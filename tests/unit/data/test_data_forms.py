"""Every row of docs/data_forms.md is loaded with its lines from its fixture: five records in the form of a real set."""

from __future__ import annotations

import base64
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import yaml

from lora_llava.data.load import load_records
from lora_llava.data.record import Record
from lora_llava.errors import DataError
from lora_llava.recipe.stages import DataSettings
from tests.helpers.faulty import encoded, scene
from tests.helpers.workbook import write_workbook

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "tests/fixtures/data_forms"
PNG = encoded(scene(1))
IMAGES = """
llava_med/3143{0..4}_F1.jpg llava_med/im{0..4}.jpg vqa_rad/synpic{0..4}.jpg vqa_rad/synpic1{0..4}.jpg
slake/imgs/xmlab{1..5}/source.jpg pmc_vqa/PMC{0..4}_F1.jpg rocov2/train/ROCOv2_2023_train_00000{1..5}.jpg
r2gen/images/CXR{1..5}/0.png docvqa/documents/x_{1..5}.png infographicvqa/{1..5}.jpeg chartqa/png/c{0..4}.png
ocr_vqa/images/07{0..4}.jpg textvqa/train_images/00{0..4}.jpg scienceqa/images/train/{1..4}/image.png
aokvqa/train2017/00000000010{0..4}.jpg rsicd/images/airport_{0..4}.jpg geochat/{0..4}.png
mvtec/bottle/test/crack/00{0..1}.png mvtec/bottle/test/good/00{0..2}.png
visa/candle/Data/Images/Normal/000{0..2}.JPG visa/candle/Data/Images/Anomaly/000{3..4}.JPG
visual_genome/VG_100K/{1..5}.jpg sharegpt4v/coco/train2017/{0..4}.jpg sharegpt4v/sam/images/{1..1}.jpg
sharegpt4v/llava/llava_pretrain/images/{2..2}.jpg llama_factory/mllm_demo_data/{0..4}.jpg ms_swift/{0..4}.jpg
roboflow/train/{0..4}_jpg.rf.abc.jpg label_studio/ab{1..5}-part.jpg label_studio/parts/{1..5}.jpg
image_folder/classes/bolt/{0..2}.png image_folder/classes/nut/{3..4}.png image_folder/metadata/{0..4}.png
image_folder/questions/{0..4}.png tables/{0..4}.png llava_next/a.jpg llava_next/b.jpg axolotl/a.png axolotl/b.png
"""


class Line(NamedTuple):
    """A row of a table."""

    form: str
    fixture: str
    lines: str
    result: str


def table(heading: str) -> list[Line]:
    text = (ROOT / "docs/data_forms.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    rows = [line[1:-1].replace("\\|", "\0").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [Line(*(cell.strip().replace("\0", "|") for cell in row)) for row in rows[1:]]


READ, REFUSED = table("Read"), table("Refused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("forms") / "data"
    shutil.copytree(FIXTURES, folder)
    for pattern in IMAGES.split():
        for path in expanded(pattern):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(PNG)
    for path in sorted(folder.rglob("*.jsonl")):
        text = path.read_text(encoding="utf-8")
        data = base64.b64encode(PNG).decode()
        path.write_text(text.replace("DATA_URL", f"data:image/png;base64,{data}").replace("BASE64", data))
    for path in sorted(folder.rglob("*.*.json")):
        if path.suffixes[-2] in _WRITERS:
            content = json.loads(path.read_text(encoding="utf-8"))
            _WRITERS[path.suffixes[-2]](path.with_suffix(""), content)
            path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder.parent / "cache"))
        datasets.disable_progress_bars()
        yield folder


def expanded(pattern: str) -> list[str]:
    match = re.search(r"\{(\d)\.\.(\d)\}", pattern)
    if match is None:
        return [pattern]
    return [pattern.replace(match[0], str(number)) for number in range(int(match[1]), int(match[2]) + 1)]


def to_data_set(content: dict[str, Any]) -> datasets.Dataset:
    """A data set with embedded images; the fixture names their files."""

    def cell(name: str | None) -> dict[str, Any] | None:
        return None if name is None else {"bytes": PNG, "path": name}

    rows = [dict(row) for row in content["rows"]]
    for row in rows:
        row.update({name: cell(row[name]) for name in content.get("image", ())})
        row.update({name: [cell(one) for one in row[name]] for name in content.get("images", ())})
    data = datasets.Dataset.from_list(rows)
    for name in content.get("image", ()):
        data = data.cast_column(name, datasets.Image(decode=False))
    for name in content.get("images", ()):
        data = data.cast_column(name, datasets.List(datasets.Image(decode=False)))
    for name, labels in content.get("label", {}).items():
        data = data.cast_column(name, datasets.ClassLabel(names=labels))
    return data


def write_tar(path: Path, samples: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as archive:
        for sample in samples:
            contents = {"jpg": PNG, "txt": sample["txt"].encode(), "json": json.dumps(sample["json"]).encode()}
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{sample['jpg']}.{suffix}")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))


_WRITERS: dict[str, Any] = {
    ".parquet": lambda path, content: to_data_set(content).to_parquet(path),
    ".saved": lambda path, content: to_data_set(content).save_to_disk(path.with_suffix("")),
    ".xlsx": lambda path, content: write_workbook(path, {"Tabelle1": content}),
    ".tar": write_tar,
}


def load(folder: Path, line: Line, **settings: Any) -> list[Record]:
    given = yaml.safe_load(f"{{{line.lines.strip('`')}}}") | settings
    if "image_root" in given:
        given["image_root"] = str(folder / given["image_root"])
    data = DataSettings.model_validate({"path": str(folder / line.fixture.strip("`")), **given})
    return load_records(data, extra=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves metadata.csv open
@pytest.mark.parametrize("line", READ, ids=lambda line: line.form)
def test_a_form_is_read_with_the_lines_of_its_row(folder: Path, line: Line) -> None:
    match = re.fullmatch(r"(\d+): `(.*)` → `(.*)`", line.result)
    assert match is not None, line.result
    records = load(folder, line)
    assert len(records) == int(match[1])
    first = records[0]
    said = [first.turns[0].text, first.turns[-1].text]
    assert said == [text.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t") for text in match.groups()[1:]]
    # Every image is there: a file, or bytes.
    with_image = [record.image for record in records if record.image is not None]
    assert len(with_image) >= len(records) - 1
    assert all((image.embedded() if image.path is None else image.path.read_bytes()) == PNG for image in with_image)


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line.form)
def test_a_form_is_refused_with_the_message_of_its_row(folder: Path, line: Line) -> None:
    with pytest.raises(DataError) as caught:
        load(folder, line)
    assert line.result in str(caught.value)
    assert str(folder) not in str(caught.value)


def test_the_table_has_every_fixture_and_enough_forms() -> None:
    names = {line.fixture.strip("`") for line in (*READ, *REFUSED)}
    made = {
        "image_folder/classes",
        "image_folder/metadata",
        "image_folder/questions",
        "mvtec/bottle/test",
        "web_dataset",
    }
    for path in FIXTURES.rglob("*.*"):
        name = str(path.relative_to(FIXTURES))
        name = re.sub(r"\.(?=(parquet|xlsx)\.json$)(.*)\.json$", r".\1", name).replace(".saved.json", "")
        if path.is_file() and not name.startswith(("image_folder", "web_dataset")) and path.suffix != ".p":
            assert name in names | {"slake/test.json"}, name
    assert made <= names
    assert len({line.form for line in READ}) >= 35


# --- traps of real sets, by their numbers


def slake(folder: Path, name: str, **settings: Any) -> set[str]:
    line = Line("", f"slake/{name}.json", "", "")
    columns = {"image": "img_name", "question": "question", "answer": "answer"}
    records = load(folder, line, image_root="slake/imgs", columns=columns, **settings)
    return {record.image.identity for record in records if record.image is not None}


def test_slake_leaks_over_all_languages_and_is_clean_in_one(folder: Path) -> None:
    assert len(slake(folder, "train") & slake(folder, "test")) == 2
    english = {"where": {"q_lang": "en"}}
    assert not slake(folder, "train", **english) & slake(folder, "test", **english)


def test_paraphrases_of_vqa_rad_have_one_group(folder: Path) -> None:
    line = next(line for line in READ if line.form == "VQA-RAD, JSON of its authors")
    groups = [record.group for record in load(folder, line)]
    assert groups == ["link-1", "link-1", "link-3"]
    assert [dict(record.extra)["answer_type"] for record in load(folder, line)] == ["CLOSED", "CLOSED", "OPEN "]


def test_all_answers_of_textvqa_count_with_their_frequency(folder: Path) -> None:
    line = next(line for line in READ if line.form == "TextVQA")
    assert [record.references.count(record.turns[-1].text) for record in load(folder, line)] == [6] * 5


def test_other_columns_are_kept(folder: Path) -> None:
    line = next(line for line in READ if line.form == "GeoChat, benchmark")
    assert dict(load(folder, line)[2].extra) == {"question_id": 2, "category": "rural_urban"}
    line = next(line for line in READ if line.form.startswith("A-OKVQA, multiple"))
    assert dict(load(folder, line)[0].extra)["image_id"] == 100


def test_records_know_where_they_are(folder: Path) -> None:
    line = next(line for line in READ if line.form == "The Cauldron")
    assert load(folder, line)[2].where == "part.parquet (train), record 3 (entry 2, texts[0])"
    line = next(line for line in READ if line.form == "OCR-VQA")
    assert load(folder, line)[1].where == "dataset.json, record 2 (entry 1, questions[1])"


def test_numbers_of_records_are_those_of_the_file_under_a_condition(folder: Path) -> None:
    line = next(line for line in READ if line.form == "VQA-RAD, test questions")
    assert [record.number for record in load(folder, line)] == [4, 5]
    assert [record.number for record in load(folder, line, max_records=1)] == [4]
