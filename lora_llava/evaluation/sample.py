"""Samples of the questions: those asked without images, those the base is asked, those on the contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_llava.data.questions import Question
from lora_llava.data.sampling import spread
from lora_llava.evaluation.scoring.exact_match import answer_tokens


def blind_subset(questions: Sequence[Question], num_questions: int) -> list[int]:
    """Return the indices of the questions about the first images that together hold at least `num_questions`.

    Each of several sources gives as many, as far as it has them. Images are not split, because blind accuracy depends
    on which questions an image is asked.
    """
    sources: dict[str, list[list[int]]] = {}
    for indices in _by_image(questions).values():
        sources.setdefault(questions[indices[0]].record.source, []).append(indices)
    subset: list[int] = []
    # The smallest source first, so that the others make up for what it lacks.
    for number, images in enumerate(sorted(sources.values(), key=lambda images: sum(map(len, images)))):
        missing = (num_questions - len(subset)) / (len(sources) - number)
        enough = len(subset) + max(missing, num_questions / len(sources))
        for indices in images:
            if len(subset) >= enough:
                break
            subset += indices
    return sorted(subset)


def spread_subset(questions: Sequence[Question], num_questions: int | None) -> list[int]:
    """Return the indices of about `num_questions` questions, evenly spaced over the set; None: of all.

    Images are not split, because an image is computed once for all its questions.
    """
    if num_questions is None or len(questions) <= num_questions:
        return list(range(len(questions)))
    without_image = ([index] for index, question in enumerate(questions) if question.image is None)
    groups = sorted([*_by_image(questions).values(), *without_image])
    # Add groups until they hold enough questions; groups differ in size.
    count = max(1, num_questions * len(groups) // len(questions))
    while True:
        subset = sorted(index for group in spread(groups, count) for index in group)
        if len(subset) >= num_questions or count >= len(groups):
            break
        count += 1
    # A few images with very many questions: split them after all.
    return spread(subset, num_questions) if len(subset) > 2 * num_questions else subset


def varied_samples(questions: Sequence[Question], count: int, among: Sequence[int] | None = None) -> list[int]:
    """Return the indices of up to `count` questions, on evenly spaced images and with answers as varied as possible.

    `among`: take only these indices.
    """
    allowed = None if among is None else set(among)
    groups = [
        group
        for indices in _by_image(questions).values()
        if (group := [index for index in indices if allowed is None or index in allowed])
    ]
    shown: Counter[tuple[str, ...]] = Counter()
    samples = []
    for indices in spread(groups, count):
        rarest = min(indices, key=lambda index: shown[answer_tokens(questions[index].answer)])
        shown[answer_tokens(questions[rarest].answer)] += 1
        samples.append(rarest)
    return samples


def _by_image(questions: Sequence[Question]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if question.image is not None:
            groups.setdefault(question.image, []).append(index)
    return groups
