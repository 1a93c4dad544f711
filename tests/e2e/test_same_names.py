"""Pictures of the same name in two directories: each record sees its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps
from rich.console import Console

from lora_llava.cli import cli
from lora_llava.conversation.encode import Turn
from lora_llava.data.images.fingerprint import picture_facts, same_pictures
from lora_llava.data.load import load_records
from lora_llava.data.questions import Question
from lora_llava.data.record import ImageSource, Record
from lora_llava.evaluation.outcome import Answers, Outcome, prediction_rows
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.stages import DataSettings
from lora_llava.run_directory.output import read_log
from lora_llava.training.run import run_recipe
from tests.helpers.runs import picture, png, write_recipe

NUM_IMAGES = 6
FEW = ("stages.instruct.max_steps=3", "stages.instruct.num_sample_answers=0", "stages.instruct.eval_steps=1")


@dataclass
class Folders:
    """Two data files of the same image names, one for training and one for validation, and a recipe of both."""

    train: Path
    validation: Path
    recipe: Path


def write_folder(directory: Path, *, inverted: bool, first: int = 0) -> Path:
    directory.mkdir()
    records = []
    for number in range(NUM_IMAGES):
        color, image = picture(number)
        (directory / f"{number}.png").write_bytes(png(ImageOps.invert(image) if inverted else image))
        turns = [{"from": "human", "value": "<image>\nWhat is the color?"}, {"from": "gpt", "value": color}]
        records.append({"id": f"{first + number}", "image": f"{number}.png", "conversations": turns})
    (directory / "d.json").write_text(json.dumps(records), encoding="utf-8")
    return directory / "d.json"


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    directory = tmp_path_factory.mktemp("same-names")
    train = write_folder(directory / "A", inverted=False)
    validation = write_folder(directory / "B", inverted=True, first=100)
    recipe = write_recipe(directory, {"model_name_or_path": str(tiny_base)}, ["instruct"])
    return Folders(train, validation, recipe)


def sources(folders: Folders) -> list[str]:
    data = f"{{path: {folders.train}, validation: {{path: {folders.validation}}}}}"
    return [f"stages.instruct.data={data}", "stages.instruct.batch_size=2"]


def losses(folders: Folders, cache: str, directory: Path) -> list[float]:
    overrides = [*FEW, *sources(folders), f"stages.instruct.cache_image_features={cache}", f"output_dir={directory}"]
    run_recipe(load_recipe(folders.recipe, overrides), Console(quiet=True))
    return [row[key] for row in read_log(directory) for key in ("loss", "eval_loss") if key in row]


@pytest.fixture(scope="module")
def uncached(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(folders, "off", tmp_path_factory.mktemp("off") / "run")


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_k33_cached_features_are_those_of_each_records_own_picture(
    folders: Folders, uncached: list[float], tmp_path: Path, cache: str
) -> None:
    assert losses(folders, cache, tmp_path / "run") == pytest.approx(uncached, rel=1e-6)
    assert len(uncached) >= 6


def test_k33_the_pictures_of_both_folders_are_compared(folders: Folders) -> None:
    records = [
        record
        for path in (folders.train, folders.validation)
        for record in load_records(DataSettings.model_validate({"path": str(path)}))
    ]
    before = picture_facts(records)
    assert before["files"] == 2 * NUM_IMAGES
    assert before["content"] == picture_facts(records[::-1])["content"]
    changed = folders.train.parent / "0.png"
    original = changed.read_bytes()
    Image.new("RGB", (5, 5), (1, 2, 3)).save(changed)
    try:
        assert not same_pictures(before, picture_facts(records))
    finally:
        changed.write_bytes(original)


def test_k33_a_leak_is_a_picture_not_a_name(folders: Folders, tmp_path: Path) -> None:
    """Other pictures of the same names are no leak; the same pictures under other names are."""
    for name in ("0.png", "1.png"):
        (folders.validation.parent / f"copy-of-{name}").write_bytes((folders.train.parent / name).read_bytes())
    records = json.loads(folders.validation.read_text(encoding="utf-8"))
    copies = [{**record, "id": f"copy-{record['id']}", "image": f"copy-of-{record['image']}"} for record in records[:2]]
    leaking = folders.validation.with_name("leaking.json")
    leaking.write_text(json.dumps([*records, *copies]), encoding="utf-8")
    overrides = [
        *sources(Folders(folders.train, leaking, folders.recipe)),
        f"output_dir={tmp_path / 'run'}",
    ]
    CliRunner().invoke(cli, ["check", str(folders.recipe), *overrides, "--workers", "1"])
    report = json.loads((tmp_path / "run/check/check.json").read_text(encoding="utf-8"))
    leaks = [one["id"] for kind in report["findings"] if kind["kind"] == "image_leak" for one in kind["records"]]
    assert leaks == ["copy-100", "copy-101"]


def test_k33_predictions_tell_pictures_of_one_name_apart() -> None:
    turns = (Turn("user", "<image>\n?"), Turn("assistant", "yes"))
    images = [ImageSource(key, None, key.encode(), file_name="0.png") for key in ("aa", "bb")]
    images.append(ImageSource("cc", None, b"cc", file_name="1.png"))
    asked = [Question(Record(str(number), image, turns, ""), ("yes",)) for number, image in enumerate(images)]
    rows = list(prediction_rows(Outcome(asked, "exact_match", {"tuned": Answers([0, 1, 2], ["yes"] * 3, [1.0] * 3)})))
    assert [(row["image"], row.get("image_key")) for row in rows] == [("0.png", "aa"), ("0.png", "bb"), ("1.png", None)]
