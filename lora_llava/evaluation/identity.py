"""The inputs of an evaluation, so that an outdated one is noticed and repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_llava.data.images.fingerprint import picture_facts, same_pictures
from lora_llava.data.load import fingerprint
from lora_llava.data.questions import QuestionSet, answers_fingerprint
from lora_llava.formats.names import WEIGHTS
from lora_llava.recipe.fields import settings_of, value_at
from lora_llava.recipe.settings import Recipe
from lora_llava.system.files import file_sha256

_IMAGES = "evaluation.data (images)"
_OTHERS = "evaluation.data.others"


def evaluation_facts(recipe: Recipe, questions: QuestionSet, artifact: Path) -> dict[str, Any]:
    """Return what an evaluation depends on: the content of its data, not their location."""
    records = [question.record for question in questions.questions]
    settings = [
        setting.key
        for setting in settings_of(Recipe)
        if setting.key.startswith("evaluation.") and not setting.may_be_path and setting.key != _OTHERS
    ]
    sources = Counter(record.source for record in records)
    return {
        **{key: value_at(recipe, key) for key in settings},
        # The content of further sources is in what follows.
        **({"evaluation.data (questions of each source)": dict(sources)} if len(sources) > 1 else {}),
        "evaluation.data (sha256 of the records)": fingerprint(records),
        "evaluation.data (sha256 of answers and own keys)": answers_fingerprint(questions.questions),
        _IMAGES: picture_facts(records),
        "precision": recipe.precision,
        "artifact": file_sha256(artifact / WEIGHTS),
        "start_from": file_sha256(recipe.start_from / WEIGHTS) if recipe.start_from else None,
    }


def differing_facts(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of inputs that changed since an evaluation was made."""
    return [key for key, value in now.items() if not _is_same(key, before.get(key), value)]


def _is_same(key: str, before: Any, now: Any) -> bool:
    return bool(before and same_pictures(before, now)) if key == _IMAGES else bool(before == now)
