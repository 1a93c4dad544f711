"""Find a model by its directory, or by its name on the Hub, from which it is downloaded once into the Hub's cache."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_llava.errors import ArtifactError, HubError
from lora_llava.system.hub.network import offline
from lora_llava.system.progress import phase

_NAME = r"[A-Za-z0-9_](?:[\w.-]*[\w])?"
_HUB_NAME = re.compile(rf"(?P<repo_id>{_NAME}/{_NAME})(?:@(?P<revision>[\w.][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
"""Name of a repository's directory in the Hub's cache; a snapshot is `snapshots/COMMIT` in it."""
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "recipe.yaml"]
_MANIFEST, _CONFIG, _ADAPTER, _INDEX = (
    "manifest.json",
    "config.json",
    "adapter_model.safetensors",
    "model.safetensors.index.json",
)


@dataclass(frozen=True, slots=True)
class HubSource:
    """A commit of a repository on the Hub, as recorded in what is made from it."""

    repo_id: str
    revision: str
    """The commit's hash."""

    def __str__(self) -> str:
        """Return what `located` takes."""
        return f"{self.repo_id}@{self.revision}"


def is_hub_name(name: str) -> bool:
    """Tell whether `name` has the form USER/REPO or USER/REPO@REVISION."""
    return _HUB_NAME.fullmatch(name) is not None


def located(model: Path | str) -> Path:
    """Return the directory of an artifact or a model: a local one, or the snapshot of `USER/REPO[@REVISION]`.

    A local directory of that name is preferred. A repository is downloaded unless it is in the cache: the files of an
    artifact or of a model, nothing pickled. Any other name is returned unchanged. Raises HubError if the repository
    cannot be downloaded, ArtifactError if it is neither artifact nor model.
    """
    path = Path(model)
    match = _HUB_NAME.fullmatch(str(model))
    if match is None or path.exists():
        return path
    return _download(match["repo_id"], match["revision"])


def hub_source(directory: Path) -> HubSource | None:
    """Return the repository and commit of a snapshot in the Hub's cache; None for any other directory."""
    *_, cached, kind, commit = ("", "", "", *directory.absolute().parts)
    match = _CACHED.fullmatch(cached)
    if match is None or kind != "snapshots" or not _COMMIT.fullmatch(commit):
        return None
    return HubSource(f"{match['owner']}/{match['name']}", commit)


def source_facts(directory: Path | None) -> dict[str, Any] | None:
    """Return `hub_source` as plain values, for a manifest or a report."""
    source = hub_source(directory) if directory is not None else None
    return None if source is None else asdict(source)


def _download(repo_id: str, revision: str | None) -> Path:
    """Return the snapshot of a repository, after downloading what is not in the cache."""
    held = _held(repo_id, revision)
    if held is not None:
        return held
    asked = f"{repo_id}@{revision}" if revision else repo_id
    if offline():
        raise HubError(
            f"{asked} is neither a directory nor whole in the Hub's cache, and HF_HUB_OFFLINE is set or the Hub cannot "
            "be reached. Correct the name, or connect"
        )
    phase(f"Downloading {asked} from the Hub")
    small = _fetch(repo_id, revision, _SMALL_FILES)
    commit = small.name
    return _fetch(repo_id, commit, [*_SMALL_FILES, *_weights(small, asked)])


def _held(repo_id: str, revision: str | None) -> Path | None:
    """Return the snapshot in the cache if it is whole, and the Hub need not be asked which commit is meant."""
    from huggingface_hub import try_to_load_from_cache

    if not (revision and _COMMIT.fullmatch(revision)) and not offline():
        return None
    for name in (_MANIFEST, _CONFIG):
        file = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(file, str):
            directory = Path(file).parent
            whole = all((directory / weights).is_file() for weights in _weights(directory, repo_id))
            return directory if whole else None
    return None


def _weights(directory: Path, asked: str) -> list[str]:
    """Return the names of the weight files of a snapshot by its small files. Raises ArtifactError if it has none."""
    if (directory / _MANIFEST).is_file():
        return [_ADAPTER]
    if (directory / _INDEX).is_file():
        try:
            names = set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            return sorted(str(name) for name in names if str(name).endswith(".safetensors") and "/" not in str(name))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{asked}: its {_INDEX} is damaged ({type(error).__name__})") from error
    if (directory / _CONFIG).is_file():
        return ["model.safetensors"]
    fix = f"Give an artifact that lora-llava pushed, or a model; other adapters: hf download {asked.partition('@')[0]}"
    raise ArtifactError(
        f"{asked} on the Hub is neither an artifact (it has no {_MANIFEST}) nor a model (no {_CONFIG}). {fix}, then "
        "lora-llava import"
    )


def _fetch(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Download files of a repository, those in its top directory alone. Raises HubError."""
    from huggingface_hub import get_token, snapshot_download

    from lora_llava.system.hub.ask import ask

    def fetch() -> Path:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))

    return ask(f"download {repo_id}", repo_id, fetch, get_token())
