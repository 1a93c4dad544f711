"""Load an artifact or a merged model, ask it and its base the same questions, and score the answers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from lora_llava.artifact import Usage, add_adapter, load_model, template_to_ask
from lora_llava.conversation.encode import Template
from lora_llava.errors import ArtifactError
from lora_llava.evaluation.compare import Asking, Models, compare
from lora_llava.evaluation.outcome import START
from lora_llava.evaluation.questions import QuestionSet
from lora_llava.recipe.settings import EvaluationSettings
from lora_llava.system.device import pick_device, pick_dtype
from lora_llava.system.progress import phase


def evaluate_artifact(
    artifact: Path,
    questions: QuestionSet,
    settings: EvaluationSettings,
    *,
    directory: Path,
    console: Console,
    precision: str = "auto",
    compare_base: bool = True,
    base: str | None = None,
    template: str | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Load an artifact or a merged model, put questions to it in the form of its training, and score it.

    `base` replaces the path where the artifact says its base is; `start` is an artifact on the same base to compare
    with, such as the one that training started from. A merged model has neither. Returns what `compare` does.
    """
    # The trained model is no longer needed: on a small card there is no room for two.
    gc.collect()
    torch.cuda.empty_cache()
    device = pick_device()
    phase("Loading the model to ask")
    loaded, usage = load_model(
        artifact, device=device, dtype=pick_dtype(precision, device), base=base, template=template
    )
    is_adapter = isinstance(loaded.model, PeftModel)
    if start is not None and not is_adapter:
        raise ArtifactError(f"{artifact} is a whole model: there is no start on the same base to compare it with")
    tuned = _asking(usage, artifact)
    models = Models(
        loaded,
        tuned,
        start=None if start is None else _start_asking(_asking(add_adapter(loaded, start, START), start), tuned),
        base=compare_base and is_adapter,
    )
    return compare(models, questions, settings, directory, console)


def _asking(usage: Usage, directory: Path) -> Asking:
    return Asking(template_to_ask(usage, directory), usage.image_aspect_ratio)


def _start_asking(start: Asking, tuned: Asking) -> Asking:
    """Return the form in which to ask a start: that of its training, unless that held no question."""
    return tuned if isinstance(start.template, Template) and start.template.caption_only else start
