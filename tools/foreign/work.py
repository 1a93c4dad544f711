"""Prepare what is asked: a finished run's artifact in every form, questions, and the kit's own answers and logits."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from lora_llava.artifact import find_base, load_model, read_manifest, template_to_ask
from lora_llava.conversation.chat_template import chat_template
from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn
from lora_llava.conversation.templates import Template
from lora_llava.data.record import ImageSource, Record
from lora_llava.generation.answers import PromptFormat, generate_answers, image_tensor, last_question
from lora_llava.shipping.export import export
from lora_llava.shipping.export.options import ExportOptions
from lora_llava.shipping.merge.run import merge_artifact
from tools.foreign.asked import write_answers
from tools.foreign.environments import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "earlier_run"
"""A tiny run of an earlier version, with its base."""
QUESTIONS = 100
ROUNDED = ("q8_0", "q4_0")
"""Types of GGUF that lose answers by rounding; how many is measured."""
_TINY = ("What is in the image?", "Is it red?", "What is the color of the shape?")


@dataclass(frozen=True, slots=True)
class Work:
    """A directory with everything that is asked."""

    directory: Path
    artifact: Path
    base: Path

    def path(self, name: str) -> str:
        """Return the path of a form, or of a file of answers."""
        return str(self.directory / name)


def prepare(run: Path | None, directory: Path) -> Work:
    """Write merged model, exports, questions and the kit's answers to `directory`. None: the tiny run."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if run is None:
        shutil.copytree(FIXTURE, directory / "tiny")
        artifact = directory / "tiny" / "finished" / "instruct"
        questions = _tiny_questions(directory)
    else:
        artifact, questions = run / "instruct", _questions_of(run)
    base = find_base(read_manifest(artifact), artifact)
    work = Work(directory, artifact, base.resolve())
    _answer(work, questions)
    # In fp32, so that rounding does not hide a difference.
    merge_artifact(artifact, directory / "merged", dtype=torch.float32)
    export(artifact, directory / "vllm", "vllm")
    export(directory / "merged", directory / "llava", "llava")
    export(directory / "merged", directory / "gguf", "gguf")
    for outtype in ROUNDED:
        export(directory / "merged", directory / f"gguf-{outtype}", "gguf", ExportOptions(outtype=outtype))
    export(artifact, directory / "gguf-lora", "gguf-lora")
    return work


def _tiny_questions(directory: Path) -> list[dict[str, Any]]:
    """Write three images of noise, square and of the size of the tower's input, so that nobody resizes them."""
    questions = []
    for index, question in enumerate(_TINY):
        path = directory / f"{index}.png"
        noise = torch.randint(0, 256, (28, 28, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
        questions.append({"image": str(path), "question": question, "max_new_tokens": 4})
    return questions


def _questions_of(run: Path) -> list[dict[str, Any]]:
    """Choose test questions of a run, evenly over its predictions."""
    settings = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["evaluation"]
    images = (run / settings["data"]["image_root"]).resolve()
    lines = (run / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: max(1, len(lines) // QUESTIONS)][:QUESTIONS]]
    limit = settings["max_new_tokens"]
    return [{"image": str(images / row["image"]), "question": row["question"], "max_new_tokens": limit} for row in rows]


@torch.no_grad()
def _answer(work: Work, questions: list[dict[str, Any]]) -> None:
    """Ask the artifact on its base, quantized as in training, with the kit; write questions, answers and logits."""
    loaded, usage = load_model(work.artifact, device=torch.device("cpu"), dtype=torch.float32)
    template = template_to_ask(usage, work.artifact)
    assert isinstance(template, Template)
    records = []
    for entry in questions:
        source = ImageSource(entry["image"], Path(entry["image"]), None)
        turn = Turn("user", f"{IMAGE_PLACEHOLDER}\n{entry['question']}")
        records.append(Record(entry["image"], source, (turn,), entry["question"]))
    form = PromptFormat(template, usage.image_aspect_ratio)
    answers = generate_answers(loaded, records, form, max_new_tokens=questions[0]["max_new_tokens"])
    logits = []
    for record in records:
        prompt = last_question(
            loaded, record, template, lambda source: image_tensor(loaded, source, usage.image_aspect_ratio)
        )
        ids = torch.tensor([prompt.input_ids])
        pixels = image_tensor(loaded, record.image, usage.image_aspect_ratio)[None]
        output = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        logits.append(output.logits[0, -1].numpy())
    write_answers(work.path("kit.json"), answers, logits)
    jinja = chat_template(template, loaded.tokenizer.eos_token)
    for entry in questions:
        content = [{"type": "image"}, {"type": "text", "text": entry["question"]}]
        entry["prompt"] = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=jinja, tokenize=False, add_generation_prompt=True
        )
    Path(work.path("questions.json")).write_text(json.dumps(questions), encoding="utf-8")
