"""Which files go up, and in what form: a listed set, without the paths of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_llava.artifact import MANIFEST, MERGE_REPORT, RECIPE, portable
from lora_llava.errors import ArtifactError
from lora_llava.formats.llava_hf import INDEX
from lora_llava.formats.names import ADAPTER_CONFIG, WEIGHTS
from lora_llava.recipe.fields import is_local
from lora_llava.recipe.file import dump_portable
from lora_llava.shipping.hub.facts import PICTURES, Facts

CARD = "README.md"
_TOKENIZER = "tokenizer.json"
_READERS = (
    "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "added_tokens.json", _TOKENIZER, "tokenizer.model", "tokenizer_config.json",
)  # fmt: skip
_LEGAL = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
_ARTIFACT = (ADAPTER_CONFIG, WEIGHTS, MANIFEST, RECIPE)
_MODEL = ("config.json", INDEX, MERGE_REPORT)
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PLACES = ("_name_or_path", "name_or_path")
"""Keys in which transformers notes where a thing was loaded from."""

_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_HOMES = r"(?<![\w-])/(?:home|Users)/[\w.-]+"
"""Relative paths too: `../../home/somebody`."""


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file of the repository: its name there, and the file here or the bytes to send."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def changed(self) -> bool:
        """Whether it goes up in another form than it has here."""
        return isinstance(self.content, bytes) and self.name != CARD


@dataclass(frozen=True, slots=True)
class Content:
    """All that goes up but the card, and what stays here."""

    files: list[RepoFile]
    left_out: list[str]


def collect(facts: Facts) -> Content:
    """List the files of an artifact or a model that go up. Raises ArtifactError if one of them is missing."""
    directory = facts.directory
    listed = [*(_ARTIFACT if facts.is_adapter else _MODEL), *_READERS, *_LEGAL]
    if not facts.is_adapter:
        listed += _shards(directory)
    files = [RepoFile(name, _published(directory / name, facts)) for name in listed if (directory / name).is_file()]
    names = {file.name for file in files}
    if missing := {_TOKENIZER, "tokenizer_config.json"} - names:
        raise ArtifactError(f"{directory}: {', '.join(sorted(missing))} is missing; the model is of no use without it")
    files += [RepoFile(name, path) for name, path in facts.pictures.items()]
    left_out = [path.name + "/" * path.is_dir() for path in directory.iterdir() if path.name not in names | {CARD}]
    return Content(sorted(files, key=lambda file: file.name), sorted(left_out))


def is_ours(name: str) -> bool:
    """Tell a file that a push writes from one that somebody put into the repository by hand."""
    return name in (*_ARTIFACT, *_MODEL, *_READERS, *PICTURES) or _SHARD.fullmatch(name) is not None


def _shards(directory: Path) -> list[str]:
    if not (directory / INDEX).is_file():
        return ["model.safetensors"]
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    if missing := [name for name in shards if not _SHARD.fullmatch(name) or not (directory / name).is_file()]:
        raise ArtifactError(f"{directory / INDEX} names {', '.join(missing)}, which is not there")
    return shards


def _published(path: Path, facts: Facts) -> Path | bytes:
    """Return a file as it is, or, if it tells of this machine, what goes up in its place."""
    if path.name == RECIPE:
        text = dump_portable(path)
        return path if text == path.read_text(encoding="utf-8") else text.encode()
    if path.suffix != ".json" or path.name in (_TOKENIZER, INDEX):
        return path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error})") from error
    clean = _without_places(data, facts) if isinstance(data, dict) else data
    if path.name == MANIFEST and facts.manifest:
        clean = portable(facts.manifest)
    return path if clean == data else (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()


def _without_places(data: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Leave out where things were loaded from, and name the base of an adapter without its place."""
    clean = {
        key: _without_places(value, facts) if isinstance(value, dict) else value
        for key, value in data.items()
        if not (key in _PLACES and is_local(str(value)))
    }
    if "base_model_name_or_path" in clean and facts.manifest and facts.base_id is None:
        clean["base_model_name_or_path"] = facts.manifest.base["name"]
    return clean


def check_private(files: Iterable[RepoFile], token: str | None) -> None:
    """Raise ArtifactError if a text among `files` holds an access token, or a path of somebody's home.

    The last line of defence: what the kit writes has neither, but texts may have been edited.
    """
    home = str(Path.home())
    places = re.compile(rf"{_HOMES}|(?<![\w-]){re.escape(home)}(?![\w.-])" if len(home) > 1 else _HOMES)
    for file in files:
        if not file.name.endswith((".json", ".jinja", ".md", ".yaml")) or file.name == _TOKENIZER:
            continue
        text = file.content.decode() if isinstance(file.content, bytes) else file.content.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            what = None
            if _SECRET.search(line) or (token and token in line):
                what = "an access token"
            elif places.search(line):
                what = "a path of this machine"
            if what:
                raise ArtifactError(f"{file.name}, line {number}, holds {what}; nothing was uploaded. Take it out.")
