"""Load an artifact or a merged model, ask it and its base the same questions, and score the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from pydantic import ValidationError
from rich.console import Console

from lora_llava.artifact import add_adapter
from lora_llava.conversation.templates import Template
from lora_llava.data.questions import QuestionSet, load_questions
from lora_llava.errors import ArtifactError, RecipeError
from lora_llava.evaluation.compare import Models, compare
from lora_llava.evaluation.outcome import START
from lora_llava.generation.answers import PromptFormat
from lora_llava.generation.asking import AskedModel, as_trained, how_computed, load_to_ask, prompt_format, usage_of
from lora_llava.recipe.errors import problems_in
from lora_llava.recipe.settings import EvaluationSettings
from lora_llava.system.files import disk_errors, refuse_results_in
from lora_llava.system.hub.artifact import located, source_facts
from lora_llava.system.progress import shown_on


@dataclass(frozen=True, slots=True)
class Candidate(AskedModel):
    """A model to evaluate, and what to compare it with."""

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
    usage = usage_of(candidate)
    settings = settings.model_copy(update={"data": as_trained(settings.data, usage)})
    questions = load_questions(settings.data, settings.broken_down_by)
    with disk_errors(output, "The results are not complete"):
        return evaluate_artifact(candidate, questions, settings, directory=output, console=console)


def evaluate_artifact(
    candidate: Candidate, questions: QuestionSet, settings: EvaluationSettings, *, directory: Path, console: Console
) -> dict[str, Any]:
    """Load a model, ask it in the form of its training, and score it; results go to `directory`.

    Returns what `compare` does. Raises ArtifactError if a whole model is to be compared with a start.
    """
    loaded, usage = load_to_ask(candidate, candidate.precision)
    if line := how_computed(loaded.model):
        console.print(f"evaluation: {line}")
    is_adapter, start = isinstance(loaded.model, PeftModel), candidate.start
    if start is not None and not is_adapter:
        raise ArtifactError(
            f"{candidate.directory} is a whole model: there is no start on the same base to compare it with"
        )
    tuned = prompt_format(usage, candidate.directory)
    models = Models(
        loaded,
        tuned,
        start=None if start is None else _start_format(prompt_format(add_adapter(loaded, start, START), start), tuned),
        base=candidate.compare_base and is_adapter,
        hub=source_facts(candidate.directory),
    )
    return compare(models, questions, settings, directory, console)


def _start_format(start: PromptFormat, tuned: PromptFormat) -> PromptFormat:
    """Return the form in which to ask a start: that of its training, unless that held no question."""
    return tuned if isinstance(start.template, Template) and start.template.caption_only else start
