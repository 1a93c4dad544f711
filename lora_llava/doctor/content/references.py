"""References of an evaluation that no answer can match."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_llava.data.questions import make_questions
from lora_llava.doctor.compare import Finding, finding_at
from lora_llava.doctor.survey import Survey
from lora_llava.evaluation.scoring.metrics import METRIC_NAMES, is_void, pick_metric
from lora_llava.system.text import counted, printable


def reference_findings(survey: Survey, tokenizer: Any) -> Iterator[Finding]:
    """Yield references that normalize to nothing, and those longer than `max_new_tokens`."""
    settings = survey.recipe.evaluation
    side = next((side for side in survey.sides if side.role == "evaluation"), None)
    if settings is None or side is None:
        return
    questions = make_questions(side.records).questions
    answers = [question.answer for question in questions]
    metric = pick_metric(settings.metric, answers)
    for question in questions:
        if is_void(metric, question.answer):
            problem = f"{question.record.where}: {printable(question.answer)!r} under {METRIC_NAMES[metric]}"
            source = side.source_of(question.record)
            yield finding_at("void_reference", source, question.record, problem, question.record.image)
    if not answers:
        return
    limit = settings.max_new_tokens
    for question, ids in zip(questions, tokenizer(answers, add_special_tokens=False)["input_ids"], strict=True):
        if len(ids) > limit:
            problem = f"{question.record.where}: {counted(len(ids), 'token')}, max_new_tokens is {limit}"
            source = side.source_of(question.record)
            yield finding_at("long_reference", source, question.record, problem, question.record.image)
