"""Which questions a model is asked where asking all would take too long, and which are shown as samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_llava.evaluation.questions import Question
from lora_llava.evaluation.scoring.exact_match import answer_tokens


def blind_subset(questions: Sequence[Question], num_questions: int) -> list[int]:
    """Return the places of the questions on the first images that together hold at least `num_questions`.

    Whole images: the share that is right blind depends on which questions an image is asked.
    """
    chosen: list[int] = []
    for places in _by_image(questions).values():
        if len(chosen) >= num_questions:
            break
        chosen += places
    return sorted(chosen)


def spread_subset(questions: Sequence[Question], num_questions: int | None) -> list[int]:
    """Return the places of about `num_questions` questions, of whole images spread evenly over the set; None: of all.

    Whole images, since an image is computed once for all its questions.
    """
    if num_questions is None or len(questions) <= num_questions:
        return list(range(len(questions)))
    units = [
        *_by_image(questions).values(),
        *([place] for place, question in enumerate(questions) if question.image is None),
    ]
    units.sort()
    count = max(1, num_questions * len(units) // len(questions))
    while True:
        chosen = sorted(place for number in range(count) for place in units[number * len(units) // count])
        if len(chosen) >= num_questions or count >= len(units):
            break
        count += 1
    # A few images with very many questions.
    if len(chosen) > 2 * num_questions:
        chosen = [chosen[number * len(chosen) // num_questions] for number in range(num_questions)]
    return chosen


def varied_samples(questions: Sequence[Question], count: int, among: Sequence[int] | None = None) -> list[int]:
    """Return the places of up to `count` questions: images spread over the set, answers as varied as may be.

    `among`: choose from these places.
    """
    allowed = None if among is None else set(among)
    groups = [
        kept
        for places in _by_image(questions).values()
        if (kept := [place for place in places if allowed is None or place in allowed])
    ]
    count = min(count, len(groups))
    shown: Counter[tuple[str, ...]] = Counter()
    chosen = []
    for number in range(count):
        places = groups[number * len(groups) // count]
        best = min(places, key=lambda place: shown[answer_tokens(questions[place].answer)])
        shown[answer_tokens(questions[best].answer)] += 1
        chosen.append(best)
    return chosen


def _by_image(questions: Sequence[Question]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        if question.image is not None:
            groups.setdefault(question.image, []).append(place)
    return groups
