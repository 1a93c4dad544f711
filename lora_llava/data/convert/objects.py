"""Ask about labeled objects: whether there is one, how many there are, and where it is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_llava.data.convert.boxes import Box, llava_box
from lora_llava.data.convert.writer import Picture, Writer

SHORT = "\nAnswer the question using a single word or phrase."
"""How LLaVA-1.5 was asked for such answers."""
WHERE = "Please provide the bounding box coordinate of the region this sentence describes: {}"
"""How LLaVA-1.5 was asked for boxes."""
BOX_RULE = "Boxes are x1, y1, x2, y2 from 0 to 1, relative to the image padded to a square (image_aspect_ratio: pad)."
_UNASKED = "Labels that are in all images with labels, or in none, get no presence questions."


@dataclass(frozen=True, slots=True)
class Labeled:
    """An object, or a label of a whole image."""

    label: str
    where: str
    """Names the annotation, for messages."""
    box: Box | None = None
    is_crowd: bool = False
    """Whether it stands for several objects, or for an unknown number of them."""
    is_tag: bool = False
    """Whether it labels the whole image."""


@dataclass(slots=True)
class Scene:
    """An image and everything that is labeled in it."""

    id: str
    picture: Picture
    split: str = "records"
    objects: list[Labeled] = field(default_factory=list)


def ask_about_objects(writer: Writer, scenes: Sequence[Scene]) -> None:
    """Write presence, count and location questions about all scenes; the same seed draws the same ones."""
    options = writer.options
    writer.report.rules += [
        "Presence: for each label as many images without it as with it, drawn with the seed; its absence is taken from "
        f"the annotations, so they must be complete. {_UNASKED}",
        "Count: objects of a label; not asked where an annotation stands for a crowd.",
        f"Location: only of labels with one object in the image. {BOX_RULE}",
        f"At most {options.per_image} count and location questions an image, and presence questions on average.",
    ]
    presence = _presence(scenes, options.per_image, options.seed)
    tags = {item.label for scene in scenes for item in scene.objects if item.is_tag}
    for index, scene in enumerate(scenes):
        for label, is_there in presence.get(index, ()):
            asked = f'Does "{label}" apply to the image?' if label in tags else _presence_question(label)
            _ask(writer, scene, "presence", label, asked + SHORT, "Yes" if is_there else "No")
        rng = random.Random(f"{options.seed}/{scene.split}/{scene.id}")
        _ask_counts(writer, scene, rng)
        _ask_locations(writer, scene, rng)


def _presence(scenes: Sequence[Scene], per_image: int, seed: int) -> dict[int, list[tuple[str, bool]]]:
    """Draw for each label as many scenes without it as with it; return the questions by the scene's index."""
    with_label: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        for label in dict.fromkeys(item.label for item in scene.objects):
            with_label.setdefault(label, []).append(index)
    pairs: list[tuple[str, int, int]] = []
    for label in sorted(with_label):
        rng = random.Random(f"{seed}/presence/{label}")
        present = with_label[label]
        absent = sorted(set(range(len(scenes))) - set(present))
        number = min(len(present), len(absent))
        pairs += zip([label] * number, rng.sample(present, number), rng.sample(absent, number), strict=True)
    max_pairs = max(1, per_image * len(scenes) // 2)
    if len(pairs) > max_pairs:
        pairs = sorted(random.Random(f"{seed}/presence").sample(pairs, max_pairs))
    questions: dict[int, list[tuple[str, bool]]] = {}
    for label, present_index, absent_index in pairs:
        questions.setdefault(present_index, []).append((label, True))
        questions.setdefault(absent_index, []).append((label, False))
    return questions


def _ask_counts(writer: Writer, scene: Scene, rng: random.Random) -> None:
    crowds = {item.label for item in scene.objects if item.is_crowd}
    counts = Counter(item.label for item in scene.objects if item.label not in crowds and item.box is not None)
    for label in _draw(sorted(counts), writer.options.per_image, rng):
        question = f'How many objects of the class "{label}" are in the image?{SHORT}'
        _ask(writer, scene, "count", label, question, str(counts[label]))


def _ask_locations(writer: Writer, scene: Scene, rng: random.Random) -> None:
    counts = Counter(item.label for item in scene.objects)
    single = {item.label: item for item in scene.objects if counts[item.label] == 1 and not item.is_crowd}
    for label in _draw(sorted(single), writer.options.per_image, rng):
        item = single[label]
        if item.box is not None:
            with writer.report.dropping():
                box = llava_box(item.box, scene.picture.size, item.where)
                _ask(writer, scene, "where", label, WHERE.format(label), box)


def _draw(labels: list[str], count: int, rng: random.Random) -> list[str]:
    """Return `count` of the labels, in order; all if there are fewer."""
    return labels if len(labels) <= count else sorted(rng.sample(labels, count))


def _ask(writer: Writer, scene: Scene, kind: str, label: str, question: str, answer: str) -> None:
    record = {"id": f"{scene.id}/{kind}/{label}", "image": scene.picture.path, "question": question, "answer": answer}
    writer.write(record, kind=kind, split=scene.split)


def _presence_question(label: str) -> str:
    return f"Is there {'an' if label[0].lower() in 'aeiou' else 'a'} {label} in the image?"
