"""The manifest of an artifact: what its values must be before they are used, and where its base is. Without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_llava.errors import ArtifactError
from lora_llava.recipe.stages import STAGES
from lora_llava.system.files import joined, shown_path
from lora_llava.system.text import texts_in

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the manifest; a reader refuses a newer one."""
BASE_OPTION = "--base-model"
"""Every command that takes an artifact has this option, for a base that is not where the manifest says."""
_Check = Callable[[Any], bool]

_HUB_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
_HUB_ID = re.compile(rf"(?:{_HUB_NAME.pattern}/)?{_HUB_NAME.pattern}", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)
_MAX_ID, _MAX_TEXT = 96, 100_000
"""Characters of a Hub id, by the Hub's rule, and of any text."""


def is_hub_id(name: str) -> bool:
    """Tell whether a name is NAME or NAMESPACE/NAME by the Hub's rule (`validate_repo_id` of huggingface_hub)."""
    return (
        len(name) <= _MAX_ID
        and _HUB_ID.fullmatch(name) is not None
        and not any(part in name for part in ("--", ".."))
        and not name.endswith(".git")
    )


def is_revision(name: str) -> bool:
    """Tell whether a text can be a commit, branch or tag of a repository."""
    return len(name) <= _MAX_TEXT and _REVISION.fullmatch(name) is not None and ".." not in name


def manifest_problem(data: Mapping[str, Any]) -> str | None:
    """Return the first value of a manifest.json that is missing or cannot be used, with what it must be."""
    for key, (is_valid, words) in _VALUES.items():
        section, _, name = key.partition(".")
        holder = data if not name else data[section]
        if (name or section) not in holder:
            if key in _OPTIONAL:
                continue
            return f"{key} is missing"
        if not is_valid(holder[name or section]):
            return f"{key} is {holder[name or section]!r:.80}, must be {words}"
    base = data["base"]
    if base["revision"] is not None and not is_hub_id(base["name"]):
        return f"base.name is {base['name']!r:.80}, which is not an id of the Hub (NAMESPACE/NAME)"
    if others := sorted(data["template"].keys() - {"name", "system"}):
        return f"template has the key {others[0]!r:.80}, which no template has"
    # It could not be written to a file, or used as a name.
    if (text := next((text for text in texts_in(data) if not _text(text)), None)) is not None:
        return f"it holds {text!r:.80}, which is no text"
    return None


def base_of(base: Mapping[str, Any], artifact: Path, given: str | None) -> str:
    """Return the directory or Hub id of an artifact's base: `given`, or what `base` of its manifest says.

    Raises ArtifactError, which names the base that is needed, if there is no such directory.
    """
    local = joined(artifact, base["path"]) if base["path"] else None
    needed = (
        f"Give its base with {BASE_OPTION} DIR: {base['name']}, whose weights have the sha256 {base['weights_sha256']}"
    )
    if given is not None:
        if not Path(given).expanduser().is_dir() and not ("/" in given and is_hub_id(given)):
            raise ArtifactError(f"{BASE_OPTION} {given}: the directory does not exist. {needed}")
        return given
    if local is not None and not local.is_dir():
        raise ArtifactError(f"{artifact} was moved away from its base: {shown_path(local)} does not exist. {needed}")
    if local is None and base["revision"] is None:
        raise ArtifactError(
            f"{artifact} was trained on a local directory, and its manifest does not say which. {needed}"
        )
    return str(local or base["name"])


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT and "\0" not in value


def _or_null(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _one_of(*values: str) -> _Check:
    return lambda value: isinstance(value, str) and value in values


def is_number(value: Any) -> bool:
    """Tell whether a value of JSON is a finite number of a size that settings can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)


def _window(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] < value[1]


def _mapping(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values())) and all(map(_text, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


_A_TEXT, _TEXT_OR_NULL, _NUMBER_OR_NULL = "text", "text or null", "a number or null"
_VALUES: dict[str, tuple[_Check, str]] = {
    "format": (lambda value: type(value) is int, "an integer"),
    "stage": (_one_of(*STAGES), " or ".join(STAGES)),
    "base": (_is_mapping, "a mapping"),
    "base.name": (_text, _A_TEXT),
    "base.revision": (_or_null(lambda value: _text(value) and is_revision(value)), "a revision of the Hub or null"),
    "base.weights_sha256": (_text, _A_TEXT),
    "base.path": (_or_null(_text), _TEXT_OR_NULL),
    "parent_sha256": (_or_null(_text), _TEXT_OR_NULL),
    "adapter_sha256": (_text, _A_TEXT),
    "quantization": (_is_mapping, "a mapping"),
    "quantization.type": (_one_of("nf4", "none"), "nf4 or none"),
    "quantization.double_quant": (lambda value: isinstance(value, bool), "true or false"),
    "quantization.compute_dtype": (_one_of("float32", "float16", "bfloat16"), "float32, float16 or bfloat16"),
    "template": (_is_mapping, "a mapping"),
    "template.name": (_text, _A_TEXT),
    "template.system": (_or_null(_text), _TEXT_OR_NULL),
    "images": (_is_mapping, "a mapping"),
    "images.image_aspect_ratio": (_one_of("pad", "square"), "pad or square"),
    "images.window": (_or_null(_window), "two numbers, the lower one first, or null"),
    "data": (_is_mapping, "a mapping"),
    "data.answer_prompt": (_or_null(_text), _TEXT_OR_NULL),
    "data.records": (_or_null(is_number), _NUMBER_OR_NULL),
    "seen": (_is_mapping, "a mapping"),
    "seen.steps": (_or_null(is_number), _NUMBER_OR_NULL),
    "seen.conversations": (_or_null(is_number), _NUMBER_OR_NULL),
    "seen.supervised_tokens": (_or_null(is_number), _NUMBER_OR_NULL),
    "metrics": (_mapping(lambda value: value is None or is_number(value)), "a mapping of numbers"),
    "versions": (_mapping(_text), "a mapping of texts"),
    "identity": (_or_null(_is_mapping), "a mapping or null"),
}
"""By dotted key: what its value must be, and in words. Sections come before their values."""
_OPTIONAL = {
    "quantization.compute_dtype", "images.window", "data.answer_prompt", "data.records", "seen.steps",
    "seen.conversations", "seen.supervised_tokens", "identity",
}  # fmt: skip
