"""Answer the questions of a data set and write the answers with their log-probabilities; a killed run continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_llava.artifact import Usage, read_manifest
from lora_llava.data.bad_records import write_bad_records
from lora_llava.data.load import fingerprint
from lora_llava.data.questions import (
    Question,
    QuestionSet,
    answers_fingerprint,
    load_image_questions,
    load_open_questions,
    shared_labels,
)
from lora_llava.errors import DataError
from lora_llava.generation.answers import PromptFormat, answer_text, end_token_ids, prompts_of
from lora_llava.generation.asking import AskedModel, as_trained, how_computed, load_to_ask, prompt_format, usage_of
from lora_llava.generation.choosing import Scored
from lora_llava.generation.decoding import decode_batch, equal_prompts, plan_decoding
from lora_llava.generation.journal import Answer, Facts, Journal, image_stamp, open_journal
from lora_llava.generation.output import SKIPPED, write_table
from lora_llava.modeling.base import LoadedModel, hash_weights
from lora_llava.modeling.folded import folded
from lora_llava.modeling.identity import artifact_fields, base_fields, identity_of
from lora_llava.recipe.stages import QuestionSettings
from lora_llava.run_directory.claim import is_artifact
from lora_llava.system.device import pick_device, pick_dtype
from lora_llava.system.files import disk_errors, new_file, shown_path
from lora_llava.system.progress import Bar
from lora_llava.system.text import counted, dtype_name, listed

_PARTIAL = ".partial"
"""What is appended to the name of the output, for the answers so far."""
FIELDS = ("prediction", "logprob_mean", "logprob_sum", "tokens", "cut")
"""Fields of an answer, after those of its question."""
_CHUNK = 4096
"""Questions that are encoded at once; those about one image share it within a chunk."""
_NUM_NAMED = 3
"""Bad records that the summary names."""
_DIGITS = 6
"""Decimals of a log-probability; further ones differ between machines."""


@dataclass(frozen=True, slots=True)
class PredictSettings:
    """What to ask a model, and how."""

    data: QuestionSettings
    question: str | None = None
    """Asked about every image below the directory `data.path`; None: the questions are in the data."""
    max_new_tokens: int = 16
    max_rows: int = 64
    """Maximum questions decoded at once."""


def predict(model: AskedModel, settings: PredictSettings, output: Path, console: Console) -> list[str]:
    """Write the answers of a model to `output`, in the order of the data; return the lines of a summary.

    Answers are those of an evaluation. Until they are complete, they are in a journal next to `output`, and a call with
    the same arguments continues from there. Raises LoraLlavaError's subclasses.
    """
    usage = usage_of(model)
    settings = replace(settings, data=as_trained(settings.data, usage))
    asked = _load(settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    journal_path = output.with_name(output.name + _PARTIAL)
    with open_journal(journal_path, _facts(model, usage, settings, asked)) as journal:
        _drop_outdated(journal, asked.questions)
        with _errors_with_progress(journal, len(asked.questions)):
            if len(journal.answers) < len(asked.questions):
                _ask_rest(model, settings, asked.questions, journal, console)
        with disk_errors(output, f"The answers stay in {journal_path.name}, and the same command writes them again"):
            write_table(output, _rows(asked.questions, journal.answers), FIELDS)
            if asked.skipped:
                with new_file(output.with_name(output.name + SKIPPED)) as temporary:
                    write_bad_records(temporary, asked.skipped)
        journal_path.unlink()
        return _summary(asked, journal.answers, settings, output)


def _load(settings: PredictSettings) -> QuestionSet:
    if settings.question is None:
        return load_open_questions(settings.data)
    return load_image_questions(Path(settings.data.path), settings.question, settings.data)


def _facts(model: AskedModel, usage: Usage, settings: PredictSettings, asked: QuestionSet) -> Facts:
    """Return everything that the answers depend on, except the content of the images."""
    device = pick_device()
    records = fingerprint(question.record for question in asked.questions)
    form = [str(usage.prompt_template), usage.image_aspect_ratio, settings.data.window]
    return {
        "the model": _identity(model.directory),
        "the form in which it is asked": hashlib.sha256(json.dumps(form).encode()).hexdigest(),
        "the questions": records,
        "the other columns": answers_fingerprint(asked.questions),
        "max_new_tokens": settings.max_new_tokens,
        "max_rows": settings.max_rows,
        "the device": f"{device.type}, {dtype_name(pick_dtype('auto', device))}",
    }


def _identity(directory: Path) -> str:
    """Return a hash of the weights of a model, and of what else in its files decides an answer."""
    if is_artifact(directory):
        manifest = read_manifest(directory)
        weights = {"adapter": manifest.adapter_sha256, "base": manifest.base["weights_sha256"]}
        return str(identity_of({**artifact_fields(directory), **weights})["sha256"])
    return str(identity_of({**base_fields(directory), "weights": hash_weights(directory)})["sha256"])


def _drop_outdated(journal: Journal, questions: Sequence[Question]) -> None:
    """Drop the answers about images that changed since they were given."""
    for index, answer in list(journal.answers.items()):
        if answer.image != _stamp(questions[index]):
            del journal.answers[index]


def _stamp(question: Question) -> str | None:
    image = question.record.image
    return None if image is None else image_stamp(image.path)


@contextmanager
def _errors_with_progress(journal: Journal, total: int) -> Iterator[None]:
    """Add the number of answers so far, and how to continue, to a DataError or an interruption inside the block."""
    try:
        yield
    except (DataError, KeyboardInterrupt) as error:
        if not (count := len(journal.answers)):
            raise
        state = f"{count:,} of {counted(total, 'answer')} are in {shown_path(journal.path)}; the same command continues"
        if isinstance(error, DataError):
            raise DataError(f"{error}. {state}", error.kind) from error
        raise KeyboardInterrupt(f"stopped: {state}") from error


def _ask_rest(
    model: AskedModel, settings: PredictSettings, questions: Sequence[Question], journal: Journal, console: Console
) -> None:
    """Load the model, and add the answers that the journal lacks, batch by batch.

    The batches are planned over all questions, so that a run that continues computes what an uninterrupted one does.
    """
    loaded, usage = load_to_ask(model)
    if line := how_computed(loaded.model):
        console.print(f"predict: {line}")
    form = prompt_format(usage, model.directory)
    bar = Bar("answers", len(questions), console)
    bar.start(len(journal.answers))
    try:
        with folded(loaded.model):
            for start in range(0, len(questions), _CHUNK):
                chunk = questions[start : start + _CHUNK]
                done = {index for index in range(len(chunk)) if start + index in journal.answers}
                for answers in _answers(loaded, form, settings, chunk, done):
                    journal.add({start + index: answer for index, answer in answers.items()})
                    bar.update(len(journal.answers))
    finally:
        bar.stop()


def _answers(
    loaded: LoadedModel, form: PromptFormat, settings: PredictSettings, questions: Sequence[Question], done: set[int]
) -> Iterator[dict[int, Answer]]:
    """Yield the answers of each batch by the index of their question; batches that are all `done` are skipped."""
    if len(done) == len(questions):
        return
    ends = end_token_ids(loaded, form.template)
    prompts = prompts_of(loaded, [question.record for question in questions], form, settings.max_rows)
    copies = equal_prompts(prompts)
    distinct = [prompts[indices[0]] for indices in copies]
    for batch in plan_decoding(loaded.model, distinct, settings.max_new_tokens, settings.max_rows):
        rest = [number for number in batch if not done.issuperset(copies[number])]
        if not rest:
            continue
        scored = Scored()
        decoded = decode_batch(
            loaded.model,
            [distinct[number] for number in rest],
            eos_token_ids=ends,
            max_new_tokens=settings.max_new_tokens,
            choose=scored,
        )
        answers: dict[int, Answer] = {}
        for row, (number, tokens) in enumerate(zip(rest, decoded, strict=True)):
            text, is_cut = answer_text(loaded.tokenizer, tokens, ends), tokens[-1] not in ends
            for index in copies[number]:
                stamp = _stamp(questions[index])
                answers[index] = Answer(text, scored.log_probabilities[row], len(tokens), is_cut, stamp)
        yield answers


def _rows(questions: Sequence[Question], answers: dict[int, Answer]) -> Iterator[dict[str, Any]]:
    """Yield the lines of the output, in the order of the questions."""
    shared = shared_labels(questions)
    for index, question in enumerate(questions):
        answer = answers[index]
        values = (
            answer.text,
            round(answer.log_probability / answer.num_tokens, _DIGITS),
            round(answer.log_probability, _DIGITS),
            answer.num_tokens,
            answer.is_cut,
        )
        yield {**question.described("reference", shared, FIELDS), **dict(zip(FIELDS, values, strict=True))}


def _summary(asked: QuestionSet, answers: dict[int, Answer], settings: PredictSettings, output: Path) -> list[str]:
    lines = [f"{counted(len(answers), 'answer')} in {shown_path(output)}"]
    if cut := sum(answer.is_cut for answer in answers.values()):
        lines.append(
            f"{counted(cut, 'answer')} cut at {counted(settings.max_new_tokens, 'token')}: raise --max-new-tokens for "
            "longer ones"
        )
    if asked.skipped:
        named = listed([bad.problem for bad in asked.skipped], _NUM_NAMED, "; ")
        lines.append(f"{counted(len(asked.skipped), 'record')} left out, listed in {output.name}{SKIPPED}: {named}")
    return lines
