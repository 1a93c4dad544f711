"""Load an artifact or a merged model, ask it and its base the same questions, and score the answers."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from pydantic import ValidationError
from rich.console import Console

from lora_llava.artifact import Usage, add_adapter, load_model, read_usage, template_to_ask
from lora_llava.conversation.templates import Template
from lora_llava.data.questions import QuestionSet, load_questions
from lora_llava.errors import ArtifactError, RecipeError
from lora_llava.evaluation.compare import Models, compare
from lora_llava.evaluation.outcome import START
from lora_llava.generation.answers import PromptFormat
from lora_llava.modeling.folded import can_fold
from lora_llava.planning.preflight.shipping import refuse_model
from lora_llava.recipe.errors import problems_in
from lora_llava.recipe.settings import EvaluationSettings
from lora_llava.system.device import pick_device, pick_dtype
from lora_llava.system.files import refuse_results_in
from lora_llava.system.hub.artifact import located, source_facts
from lora_llava.system.progress import phase, shown_on


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to evaluate, and what to compare it with."""

    directory: Path
    """An artifact or a merged model."""
    base: str | None = None
    """Directory or hub id of the base, if it is not where the artifact says."""
    template: str | None = None
    """Template to ask in, for a model that does not say its own."""
    precision: str = "auto"
    compare_base: bool = True
    """Whether to ask an artifact's base, too; a merged model has none."""
    start: Path | None = None
    """Artifact on the same base to compare with, such as the one that training started from."""


def evaluate(
    model: Path | str,
    settings: EvaluationSettings | Mapping[str, Any],
    output: Path | str,
    *,
    console: Console | None = None,
    base: str | None = None,
    compare_base: bool = True,
) -> dict[str, Any]:
    """Ask an artifact (and its base) or a merged model the questions of a data set, as `lora-llava eval` does.

    `settings`: the section `evaluation` of a recipe, such as `{"data": {"path": "test.json"}}`; paths are relative to
    the current directory. Writes predictions, accuracies and samples to `output`, which must be empty or absent.
    Returns the accuracies; see docs/evaluation.md. Raises LoraLlavaError's subclasses.
    """
    if not isinstance(settings, EvaluationSettings):
        try:
            settings = EvaluationSettings.model_validate(settings)
        except ValidationError as error:
            raise RecipeError("\n".join(problems_in(error, "evaluation"))) from error
    candidate = Candidate(located(model), base, compare_base=compare_base)
    with shown_on(console) as shown:
        return evaluate_candidate(candidate, settings, Path(output), shown)


def evaluate_candidate(
    candidate: Candidate, settings: EvaluationSettings, output: Path, console: Console
) -> dict[str, Any]:
    """Check the model and `output`, read the questions, ask them, and return what `compare` does; see `evaluate`."""
    refuse_results_in(output)
    refuse_model(candidate.directory, candidate.base)
    usage = read_usage(candidate.directory, candidate.template)
    template_to_ask(usage, candidate.directory)
    settings = _as_trained(settings, usage)
    questions = load_questions(settings.data, settings.by)
    return evaluate_artifact(candidate, questions, settings, directory=output, console=console)


def _as_trained(settings: EvaluationSettings, usage: Usage) -> EvaluationSettings:
    """Fill in what the data section leaves open from the model's training: text after questions, range of grays."""
    trained = {"answer_prompt": usage.answer_prompt, "window": usage.window and list(usage.window)}
    missing = {key: value for key, value in trained.items() if getattr(settings.data, key) is None}
    return settings.model_copy(update={"data": settings.data.model_copy(update=missing)})


def evaluate_artifact(
    candidate: Candidate, questions: QuestionSet, settings: EvaluationSettings, *, directory: Path, console: Console
) -> dict[str, Any]:
    """Load a model, ask it in the form of its training, and score it; results go to `directory`.

    Returns what `compare` does. Raises ArtifactError if a whole model is to be compared with a start.
    """
    # The trained model is no longer needed: on a small card there is no room for two.
    gc.collect()
    torch.cuda.empty_cache()
    device = pick_device()
    phase("Loading the model to ask")
    loaded, usage = load_model(
        candidate.directory,
        device=device,
        dtype=pick_dtype(candidate.precision, device),
        base=candidate.base,
        template=candidate.template,
        keep_dequantized=None,
    )
    if line := _how_computed(loaded.model):
        console.print(f"evaluation: {line}")
    is_adapter, start = isinstance(loaded.model, PeftModel), candidate.start
    if start is not None and not is_adapter:
        raise ArtifactError(
            f"{candidate.directory} is a whole model: there is no start on the same base to compare it with"
        )
    tuned = _prompt_format(usage, candidate.directory)
    models = Models(
        loaded,
        tuned,
        start=None if start is None else _start_format(_prompt_format(add_adapter(loaded, start, START), start), tuned),
        base=candidate.compare_base and is_adapter,
        hub=source_facts(candidate.directory),
    )
    return compare(models, questions, settings, directory, console)


def _how_computed(model: Any) -> str | None:
    """Say with which weights an adapter is asked; None for a whole model."""
    if not isinstance(model, PeftModel):
        return None
    if any(isinstance(module, Linear4bit) for module in model.modules()):
        return "asked in 4 bits: the dequantized weights would take more than half of the free memory"
    if can_fold(model):
        return "asked in fp32, with the adapter folded into the weights, as merge does"
    return "asked with the adapter next to the base, whose weights are in the compute type"


def _prompt_format(usage: Usage, directory: Path) -> PromptFormat:
    return PromptFormat(template_to_ask(usage, directory), usage.image_aspect_ratio)


def _start_format(start: PromptFormat, tuned: PromptFormat) -> PromptFormat:
    """Return the form in which to ask a start: that of its training, unless that held no question."""
    return tuned if isinstance(start.template, Template) and start.template.caption_only else start
