"""Decide everything about a push before the first request: the files, the card, what stays here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # their way to export

from lora_llava.errors import ArtifactError, HubError
from lora_llava.shipping.hub.card import check_card, make_card
from lora_llava.shipping.hub.content import CARD, RepoFile, check_private, collect
from lora_llava.shipping.hub.facts import DATA_PICTURES, gather
from lora_llava.system.text import listed


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything to upload, decided and checked before the first request."""

    repo_id: str
    files: list[RepoFile]
    """Including the card."""
    left_out: list[str]
    withheld: list[str]
    """Files of the run that show data, which are uploaded only if asked for."""
    card: str
    own_card: bool
    """Whether the card is the directory's own README.md."""
    needs_local_base: bool


def prepare(source: Path, repo_id: str, *, run: Path | None = None, samples: bool = False) -> Prepared:
    """Decide what of `source`, an artifact or a model, to upload to `repo_id`; makes no request.

    `run`: directory of its run, for results and images; `samples`: also the images that show test data. Raises
    ArtifactError or HubError for what cannot be published.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository name: {error} Give it as NAMESPACE/NAME.") from error
    facts = gather(source, run)
    if samples and not facts.pictures.keys() & DATA_PICTURES:
        raise ArtifactError(
            f"--samples has no effect: the run of {source} has no {listed(DATA_PICTURES)}; name its run with --run, or "
            "leave it out"
        )
    withheld = [] if samples else [name for name in DATA_PICTURES if facts.pictures.pop(name, None)]
    content = collect(facts)
    own = source / CARD
    if own.is_file():
        card = _read_card(own)
        check_card(card, str(own))
        content.files.append(RepoFile(CARD, own))
    else:
        card = make_card(facts, repo_id)
        content.files.append(RepoFile(CARD, card.encode()))
    check_private(content.files, get_token())
    files = sorted(content.files, key=lambda file: file.name)
    local_base = facts.is_adapter and facts.base_id is None
    return Prepared(repo_id, files, content.left_out, withheld, card, own.is_file(), local_base)


def _read_card(path: Path) -> str:
    """Read a hand-written card; ArtifactError if it is not UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text (byte {error.start})") from error
