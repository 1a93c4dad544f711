"""Data, recipes and runs small enough for a test, and a look into what a run changes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

import lora_llava.training.train as train_module
from lora_llava.recipe.file import load_recipe
from lora_llava.recipe.settings import Recipe
from lora_llava.run_directory.output import read_log
from lora_llava.training.run import run_recipe

COLORS = {"red": (250, 20, 20), "green": (20, 240, 20), "blue": (20, 20, 250), "grey": (120, 120, 120)}
NUM_IMAGES = 12
QUESTIONS_PER_IMAGE = 4

State = dict[str, torch.Tensor]


def picture(number: int) -> tuple[str, Image.Image]:
    """Return the name of a color and a noisy image of it, never square."""
    rng = random.Random(number)
    name = list(COLORS)[number % len(COLORS)]
    image = Image.new("RGB", (20 + number, 33), COLORS[name])
    for _ in range(60):
        image.putpixel((rng.randrange(20), rng.randrange(33)), tuple(rng.randrange(256) for _ in range(3)))
    return name, image


def png(image: Image.Image) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def questions(color: str) -> list[tuple[str, str]]:
    """Questions about an image of one color, with answers of different lengths."""
    return [
        ("What is the colour?", color),
        ("Is it red?", "yes" if color == "red" else "no"),
        ("Is it the colour of the sky on a good day?", "yes, it is" if color == "blue" else "no, it is not"),
        ("What is it?", f"a thing that is {color}"),
    ][:QUESTIONS_PER_IMAGE]


def write_data(directory: Path) -> None:
    """Write a dozen images, a caption and some questions for each, in LLaVA's form."""
    (directory / "images").mkdir(parents=True)
    captions, records = [], []
    for number in range(NUM_IMAGES):
        color, image = picture(number)
        name = f"{number}.png"
        (directory / "images" / name).write_bytes(png(image))
        captions.append(_record(f"c{number}", name, "What is in the image?", f"a {color} thing"))
        records += [_record(f"q{number}-{n}", name, *pair) for n, pair in enumerate(questions(color))]
    (directory / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    (directory / "train.json").write_text(json.dumps(records), encoding="utf-8")


def _record(identity: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": image, "conversations": turns}


def write_recipe(directory: Path, base: dict[str, Any], stages: Sequence[str] = ("align", "instruct")) -> Path:
    """Write a recipe next to the data that `write_data` wrote, and return its path."""
    common = {"max_length": 200, "tokens_per_micro_batch": 400, "logging_steps": 1}
    settings: dict[str, Any] = {
        "align": common
        | {
            "data": {"path": "captions.json", "image_root": "images"},
            "batch_size": 4,
            "learning_rate": 0.01,
        },
        "instruct": common
        | {
            "data": {"path": "train.json", "image_root": "images", "validation": {"share": 0.2}},
            "batch_size": 9,
            "learning_rate": 0.005,
            "mm_projector_lr": 0.001,
            "branches_per_tree": 4,
            "eval_steps": 2,
            "num_sample_answers": 2,
        },
    }
    recipe = {
        "version": 1,
        "name": "tiny",
        "output_dir": "run",
        "base": base,
        "quantization": {"type": "none"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "stages": {stage: settings[stage] for stage in stages},
    }
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@dataclass
class StageRun:
    """What a stage began and ended with, by the names of its parameters and buffers."""

    trainable: set[str]
    before: State
    after: State

    @property
    def changed(self) -> set[str]:
        """Names of all tensors that are not what they were, bit by bit."""
        assert self.before.keys() == self.after.keys()
        return {name for name in self.before if not torch.equal(self.before[name], self.after[name])}


@dataclass
class Run:
    """A run that was watched."""

    recipe: Recipe
    summary: dict[str, Any]
    stages: dict[str, StageRun]
    text: str

    @property
    def directory(self) -> Path:
        """Where it wrote."""
        return self.recipe.resolved_output_dir

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return read_log(self.directory)

    def losses(self, stage: str, key: str = "loss") -> list[float]:
        """The logged losses of a stage."""
        return [row[key] for row in self.log if row["stage"] == stage and key in row]


def state_of(model: torch.nn.Module) -> State:
    """Copy every parameter and buffer."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def watched_run(path: Path, *overrides: str, overwrite: bool = False) -> Run:
    """Run a recipe file, with every tensor of each stage's model copied before and after."""
    recipe = load_recipe(path, overrides)
    stages: dict[str, StageRun] = {}
    original = train_module.make_trainer

    def watch(*args: Any, **kwargs: Any) -> Any:
        trainer = original(*args, **kwargs)
        train = trainer.train

        def watched_train(**options: Any) -> Any:
            before = state_of(trainer.model)
            trainable = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
            result = train(**options)
            stages[args[0].name] = StageRun(trainable, before, state_of(trainer.model))
            return result

        trainer.train = watched_train
        return trainer

    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "make_trainer", watch)
        summary = run_recipe(recipe, Console(file=shown, width=200), overwrite=overwrite)
    return Run(recipe, summary, stages, shown.getvalue())
