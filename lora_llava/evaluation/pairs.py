"""Make preference pairs: the reference of a question as the chosen answer, wrong answers of the model as rejected ones.

Wrong answers are drawn from the model, or are its answers to the same question about another image.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from lora_llava.conversation.encode import IMAGE_PLACEHOLDER, Turn
from lora_llava.data.questions import Question, load_questions
from lora_llava.data.record import ImageSource
from lora_llava.errors import DataError
from lora_llava.evaluation.scoring.exact_match import answer_tokens, exact_match
from lora_llava.evaluation.scoring.metrics import pick_metric, score_answer
from lora_llava.generation.answers import PromptFormat, answer_text, end_token_ids, generate_answers, prompts_of
from lora_llava.generation.asking import AskedModel, as_trained, how_computed, load_to_ask, prompt_format, usage_of
from lora_llava.generation.choosing import Sampled
from lora_llava.generation.decoding import decode_batch, plan_decoding
from lora_llava.modeling.base import LoadedModel
from lora_llava.modeling.folded import folded
from lora_llava.recipe.choices import Metric, MetricSetting
from lora_llava.recipe.file import one_line
from lora_llava.recipe.stages import DataSettings
from lora_llava.system.files import disk_errors, json_text, new_file, shown_path
from lora_llava.system.progress import Bar
from lora_llava.system.text import counted

Kind = Literal["sampled", "other_image"]
_MIN_RIGHT_SCORE = 0.5
"""Lowest score of an answer that is not rejected; scores of exact match are 0 or 1."""
_TURNS_OF_FIRST = 2
"""Turns of a first question with its answer."""
_SPEAKERS = {"user": "human", "assistant": "gpt"}
_RESERVED = frozenset({"id", "image", "images", "system", "conversations", "messages", "rejected", "kind", "times"})


@dataclass(frozen=True, slots=True)
class PairSettings:
    """How pairs are made."""

    data: DataSettings
    num_samples: int = 4
    """Answers drawn for each question."""
    temperature: float = 1.0
    seed: int = 42
    per_question: int = 1
    """Maximum pairs of drawn answers for each question: its most frequent wrong ones."""
    at_least: int = 1
    """How many of the drawn answers to a question must agree on a wrong one that is rejected."""
    other_image: float = 0.5
    """Share of the first questions about an image that are also asked about another image."""
    metric: MetricSetting = "auto"
    max_new_tokens: int = 16
    max_rows: int = 64
    """Maximum answers decoded at once."""


class Sample(NamedTuple):
    """An answer of the model."""

    text: str
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """A question whose reference is preferred to a wrong answer."""

    question: Question
    rejected: str
    kind: Kind
    times: int = 1
    """How many of the drawn answers it is."""
    number: int = 1
    """Its number among the pairs of drawn answers to the question, from 1."""


@dataclass(frozen=True, slots=True)
class _PairSet:
    """The pairs of a data set, and what became of its questions."""

    pairs: Sequence[Pair]
    num_questions: int
    all_right: int
    """Questions without a pair because every answer was right."""
    unusable: int
    """Questions whose wrong answers were all empty, cut short, or with an image tag."""
    too_rare: int = 0
    """Questions whose wrong answers were too rare among the drawn ones."""


def make_pairs(model: AskedModel, settings: PairSettings, output: Path, console: Console) -> list[str]:
    """Ask a model the answered questions of a data set, and write the pairs to `output`, a .json or .jsonl file.

    The file is in LLaVA's form with the key `rejected`, which stage `prefer` reads; the same arguments give the same
    pairs. Returns the lines of a summary. Raises LoraLlavaError's subclasses; DataError if there is no pair.
    """
    usage = usage_of(model)
    data = as_trained(settings.data, usage)
    questions = load_questions(data).questions
    loaded, usage = load_to_ask(model)
    if line := how_computed(loaded.model):
        console.print(f"pairs: {line}")
    form = prompt_format(usage, model.directory)
    with folded(loaded.model):
        samples = _sample(loaded, form, questions, settings, console)
        others = _ask_about_others(loaded, form, questions, settings, console)
    metric = pick_metric(settings.metric, [question.answer for question in questions])
    result = pair_up(questions, samples, others, metric, settings.per_question, settings.at_least)
    if not result.pairs:
        raise DataError(
            f"none of {counted(len(questions), 'question')} gave a pair: {result.all_right:,} were answered right each "
            "time; draw more samples, at a higher temperature, or take harder questions"
        )
    with disk_errors(output, "Nothing was written"), new_file(output) as temporary:
        _write(temporary, [pair_record(pair, data.answer_prompt) for pair in result.pairs], output.suffix.lower())
    return _summary(result, data, output)


def _sample(
    loaded: LoadedModel, form: PromptFormat, questions: Sequence[Question], settings: PairSettings, console: Console
) -> list[list[Sample]]:
    """Draw answers to each question; an answer depends only on the seed, its question and its number."""
    ends, count = end_token_ids(loaded, form.template), settings.num_samples
    prompts = prompts_of(loaded, [question.record for question in questions], form, settings.max_rows)
    rows = [prompt for prompt in prompts for _ in range(count)]
    samples: list[list[Sample]] = [[Sample("", is_cut=False)] * count for _ in questions]
    done = 0
    with Bar("answers, drawn", len(rows), console) as bar:
        for batch in plan_decoding(loaded.model, rows, settings.max_new_tokens, settings.max_rows):
            seeds = [_seed(settings, questions[row // count], str(row % count)) for row in batch]
            decoded = decode_batch(
                loaded.model,
                [rows[row] for row in batch],
                eos_token_ids=ends,
                max_new_tokens=settings.max_new_tokens,
                choose=Sampled(settings.temperature, seeds),
            )
            for row, tokens in zip(batch, decoded, strict=True):
                text = answer_text(loaded.tokenizer, tokens, ends)
                samples[row // count][row % count] = Sample(text, tokens[-1] not in ends)
            done += len(batch)
            bar.update(done)
    return samples


def _ask_about_others(
    loaded: LoadedModel, form: PromptFormat, questions: Sequence[Question], settings: PairSettings, console: Console
) -> dict[int, Sample]:
    """Answer a share of the first questions greedily about another image; return the answers by index of question."""
    other = _other_images(questions, settings.seed)
    asked = {
        index: replace(question.record, image=other[question.image])
        for index, question in enumerate(questions)
        if len(question.record.turns) == _TURNS_OF_FIRST
        and question.image in other
        and random.Random(_seed(settings, question, "other")).random() < settings.other_image
    }
    cut: set[int] = set()
    with Bar("answers, other image", max(1, len(asked)), console) as bar:
        texts = generate_answers(
            loaded,
            list(asked.values()),
            form,
            max_new_tokens=settings.max_new_tokens,
            max_rows=settings.max_rows,
            progress=lambda done, _: bar.update(done),
            on_cut=cut.add,
        )
    return {index: Sample(text, number in cut) for number, (index, text) in enumerate(zip(asked, texts, strict=True))}


def _other_images(questions: Sequence[Question], seed: int) -> dict[str | None, ImageSource]:
    """Return another image for each image, the same for all its questions; empty if there is only one image.

    Every image takes the next one's questions in a shuffled circle, so that questions still share their image.
    """
    images = {image.identity: image for question in questions if (image := question.record.image) is not None}
    circle = list(images.values())
    random.Random(f"{seed}/images").shuffle(circle)
    if len(circle) < 2:
        return {}
    return {image.identity: circle[index - 1] for index, image in enumerate(circle)}


def _seed(settings: PairSettings, question: Question, name: str) -> str:
    return f"{settings.seed}/{question.record.number}/{question.number}/{name}"


def pair_up(
    questions: Sequence[Question],
    samples: Sequence[Sequence[Sample]],
    others: dict[int, Sample],
    metric: Metric,
    per_question: int = 1,
    at_least: int = 1,
) -> _PairSet:
    """Return the pairs of each question: its most frequent wrong samples, then a wrong answer to another image.

    An answer is wrong if its score is below one half and it does not equal the reference. Of answers that normalize to
    the same words, one makes a pair.
    """
    pairs: list[Pair] = []
    all_right = unusable = too_rare = 0
    for index, question in enumerate(questions):
        answers = [*samples[index], *([others[index]] if index in others else [])]
        wrong = [answer for answer in answers if is_wrong(metric, question, answer.text)]
        groups = _wrong_groups(question, samples[index], metric)
        accepted = [
            Pair(question, texts[0], "sampled", len(texts), number)
            for number, texts in enumerate(list(groups.values())[:per_question], start=1)
            if len(texts) >= at_least
        ]
        other = others.get(index)
        if other is not None and _is_usable(other) and answer_tokens(other.text) not in groups:
            accepted += [Pair(question, other.text, "other_image")] if is_wrong(metric, question, other.text) else []
        pairs += accepted
        all_right += not wrong
        unusable += bool(wrong) and not any(map(_is_usable, wrong))
        too_rare += any(map(_is_usable, wrong)) and not accepted
    return _PairSet(pairs, len(questions), all_right, unusable, too_rare)


def _wrong_groups(question: Question, samples: Sequence[Sample], metric: Metric) -> dict[tuple[str, ...], list[str]]:
    """Group the wrong answers by their words, the largest group first; of equal ones, the one that was drawn first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for sample in samples:
        if _is_usable(sample) and is_wrong(metric, question, sample.text):
            groups.setdefault(answer_tokens(sample.text), []).append(sample.text)
    return dict(sorted(groups.items(), key=lambda group: len(group[1]), reverse=True))


def is_wrong(metric: Metric, question: Question, text: str) -> bool:
    """Tell whether an answer can be rejected: with ten references, even the most frequent one may score below half."""
    return score_answer(metric, text, question.references) < _MIN_RIGHT_SCORE and not exact_match(text, question.answer)


def _is_usable(sample: Sample) -> bool:
    return bool(sample.text.strip()) and not sample.is_cut and IMAGE_PLACEHOLDER not in sample.text


def pair_record(pair: Pair, answer_prompt: str | None) -> dict[str, Any]:
    """Return a pair in LLaVA's form, as the data had it: without the text that settings append to questions."""
    record = pair.question.record
    name = f"{record.id}/{pair.question.number}" if pair.question.of > 1 else record.id
    own = {f"data_{key}" if key in _RESERVED else key: value for key, value in pair.question.own.items()}
    image = {} if record.image is None else {"image": _image_cell(record.image)}
    system = {} if record.system is None else {"system": record.system}
    turns = [{"from": _SPEAKERS[turn.role], "value": _asked_text(turn, answer_prompt)} for turn in record.turns]
    return {
        "id": f"{name}/{pair.kind}" + (f"/{pair.number}" if pair.number > 1 else ""),
        **image,
        **system,
        "conversations": turns,
        "rejected": pair.rejected,
        "kind": pair.kind,
        "times": pair.times,
        **own,
    }


def _asked_text(turn: Turn, answer_prompt: str | None) -> str:
    return turn.text.removesuffix(f"\n{answer_prompt}") if turn.role == "user" and answer_prompt else turn.text


def _image_cell(image: ImageSource) -> str:
    """Return the path of an image below its root, or an embedded image as a data URL."""
    if image.path is not None:
        return image.key
    return f"data:image;base64,{base64.b64encode(image.embedded()).decode()}"


def _write(path: Path, records: Sequence[dict[str, Any]], suffix: str) -> None:
    lines = [json_text(record, ensure_ascii=False) for record in records]
    text = "\n".join(lines) if suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]"
    path.write_text(text + "\n", encoding="utf-8")


def _summary(result: _PairSet, data: DataSettings, output: Path) -> list[str]:
    kinds = [pair.kind for pair in result.pairs]
    used = len({id(pair.question) for pair in result.pairs})
    lines = [
        f"{counted(len(kinds), 'pair')} in {shown_path(output)}: {kinds.count('sampled'):,} of wrong samples, "
        f"{kinds.count('other_image'):,} of answers to another image",
        f"{used:,} of {counted(result.num_questions, 'question')} gave pairs; {result.all_right:,} were answered right "
        f"each time; {result.unusable:,} had only wrong answers that were empty or cut short"
        + (f", {result.too_rare:,} only rare ones" if result.too_rare else ""),
    ]
    with_path = any(pair.question.record.image and pair.question.record.image.path for pair in result.pairs)
    root = data.image_root or (data.path if Path(data.path).is_dir() else str(Path(data.path).parent))
    settings = {"path": shown_path(output), **({"image_root": root} if with_path else {})}
    return [*lines, f"to train on them: stages.prefer.data: {one_line(settings)}"]
