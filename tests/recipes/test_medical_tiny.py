"""The medical recipe, unchanged but for the model, the data and the length of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lora_llava.artifact import read_manifest
from lora_llava.modeling.stages import is_quantized
from lora_llava.recipe.file import load_recipe
from lora_llava.training import train as train_module
from tests.helpers.runs import NUM_IMAGES, picture, png, questions, watched_run

RECIPE = Path(__file__).parents[2] / "recipes" / "medical_vqa.yaml"


def write_parquet(path: Path) -> int:
    """Write a file with VQA-RAD's columns, an image repeated for each of its questions; return its rows."""
    rows: dict[str, list[Any]] = {"image": [], "question": [], "answer": []}
    for number in range(NUM_IMAGES):
        color, image = picture(number)
        for question, answer in questions(color):
            rows["image"].append({"bytes": png(image), "path": None})
            rows["question"].append(question)
            rows["answer"].append(answer)
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return len(rows["question"])


def test_the_recipe_runs(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    count = write_parquet(tmp_path / "vqa_rad.parquet")
    loaded: list[Any] = []
    original = train_module.check_stage

    def watch(model: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(model)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(train_module, "check_stage", watch)
    made = watched_run(
        RECIPE,
        f"base.model_name_or_path={tiny_base}",
        f"stages.instruct.data.path={tmp_path / 'vqa_rad.parquet'}",
        f"evaluation.data.path={tmp_path / 'vqa_rad.parquet'}",
        f"output_dir={tmp_path / 'run'}",
        "adapter.r=4",
        "quantization.keep_dequantized=false",
        "stages.instruct.batch_size=8",
        "stages.instruct.max_steps=4",
        "stages.instruct.eval_steps=2",
        "stages.instruct.logging_steps=1",
        "stages.instruct.dataloader_num_workers=0",
    )
    stage = made.stages["instruct"]
    assert stage.changed == stage.trainable
    assert sum(is_quantized(parameter) for parameter in loaded[0].parameters()) == 14
    assert len(made.losses("instruct")) == 4
    assert len(made.losses("instruct", "eval_loss")) >= 2
    manifest = read_manifest(made.directory / "instruct")
    assert manifest.data["records"] + manifest.data["validation_records"] == count
    assert manifest.data["answer_prompt"] == "Answer the question using a single word or phrase."
    samples = [row["samples"] for row in made.log if "samples" in row][-1]
    assert samples
    assert all(manifest.data["answer_prompt"] in sample["question"] for sample in samples)
    json.dumps(made.summary)


def test_the_recipe_is_the_one_for_medical_questions() -> None:
    recipe = load_recipe(RECIPE)
    assert recipe.stage_names == ["instruct"]
    assert recipe.quantization.type == "nf4"
    assert recipe.base.model_name_or_path == "llava-hf/llava-1.5-7b-hf"
    assert "NOT FOR CLINICAL USE" in RECIPE.read_text(encoding="utf-8")
