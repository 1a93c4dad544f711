"""Push to the Hub, top to bottom: prepare, create, compare, commit, verify."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile as RemoteFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # their way to export

from lora_llava.errors import ArtifactError, HubError
from lora_llava.shipping.hub.card import check_card, is_unedited, make_card
from lora_llava.shipping.hub.client import ask, refuse_offline
from lora_llava.shipping.hub.content import CARD, RepoFile, check_private, collect, is_ours
from lora_llava.shipping.hub.facts import gather

_ATTRIBUTES = ".gitattributes"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything to upload, decided and checked before the first request."""

    repo_id: str
    files: list[RepoFile]
    """Including the card."""
    left_out: list[str]
    card: str
    own_card: bool
    """Whether the card is the directory's own README.md."""
    needs_local_base: bool


def prepare(source: Path, repo_id: str, *, run: Path | None = None, samples: bool = True) -> Prepared:
    """Decide what of `source`, an artifact or a model, to upload to `repo_id`; makes no request.

    `run`: directory of its run, for results and images. Raises ArtifactError or HubError for what cannot be published.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository name: {error} Give it as NAMESPACE/NAME.") from error
    facts = gather(source, run)
    if not samples:
        facts.pictures.pop("samples.png", None)
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
    return Prepared(repo_id, files, content.left_out, card, own.is_file(), local_base)


def publish(
    model: Path | str, repo_id: str, *, public: bool = False, run: Path | None = None, samples: bool = True
) -> list[str]:
    """Publish an artifact or a model on the Hugging Face Hub as `repo_id`, as `lora-llava push` does.

    Private unless `public`. `run`: directory of its run, for the card's results and pictures; None: the one that the
    artifact is in. Returns lines that say what was sent. Raises ArtifactError or HubError.
    """
    return push(prepare(Path(model), repo_id, run=run, samples=samples), public=public)


def push(prepared: Prepared, *, public: bool = False) -> list[str]:
    """Create the repository if it does not exist, and commit what it lacks. Returns the lines to show.

    Private unless `public`. All files appear at once, in one commit on the revision that was compared. Files of an
    earlier push that this one lacks are removed; other files stay. Raises HubError.
    """
    refuse_offline()
    token = get_token()
    if token is None:
        raise HubError("there is no access token. Log in with: hf auth login, or set HF_TOKEN")
    api = HfApi(token=token, library_name="lora-llava")
    name = prepared.repo_id
    url = ask(f"create {name}", name, lambda: api.create_repo(name, private=not public, exist_ok=True), token)
    repo_id = url.repo_id
    info = ask(f"look at {repo_id}", repo_id, lambda: api.model_info(repo_id), token)
    if not info.private and not public:
        raise HubError(f"{repo_id} exists and is public. Give --public to publish there, or use another name")
    files, lines = _with_card(prepared, api, info, token)
    names = {file.name for file in files}
    stale = sorted(name for name in _names(info) - names if is_ours(name))
    additions: list[CommitOperationAdd] = []

    def commit() -> str:
        # Computed again in each attempt: the previous one may have succeeded, and only its response been lost.
        present = _names(api.model_info(repo_id))
        additions[:] = [CommitOperationAdd(file.name, file.content) for file in files]
        deletions = [CommitOperationDelete(name) for name in stale if name in present]
        return api.create_commit(
            repo_id,
            [*additions, *deletions],
            commit_message="Upload with lora-llava",
            parent_commit=info.sha,
        ).oid

    oid = ask(f"commit to {repo_id}", repo_id, commit, token)
    _check_remote(api, repo_id, oid, additions, token)
    visibility = "private" if info.private else "public"
    if oid == info.sha:
        lines.insert(
            0, f"{url}: nothing to do, its {len(files)} files are there already ({visibility}, commit {oid[:8]})"
        )
        return lines
    lines.insert(0, f"{url}: {len(files)} files, {visibility}, commit {oid[:8]}; their hashes match the local files")
    if stale:
        lines.append(f"removed, from an earlier push: {', '.join(stale)}")
    if others := sorted(_names(info) - names - set(stale) - {_ATTRIBUTES, CARD}):
        lines.append(f"kept, not from lora-llava: {', '.join(others)}")
    return lines


def _names(info: ModelInfo) -> set[str]:
    return {file.rfilename for file in info.siblings or []}


def _with_card(prepared: Prepared, api: HfApi, info: ModelInfo, token: str) -> tuple[list[RepoFile], list[str]]:
    """Leave the card out if the one on the Hub was edited by hand; a local README.md replaces it."""
    if prepared.own_card or CARD not in _names(info):
        return prepared.files, []
    with tempfile.TemporaryDirectory() as directory:
        path = ask(
            f"read the card of {info.id}",
            info.id,
            lambda: api.hf_hub_download(info.id, CARD, revision=info.sha, local_dir=directory),
            token,
        )
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    if is_unedited(text):
        return prepared.files, []
    note = f"kept: {CARD} on the Hub, which was edited there. To replace it, put your own {CARD} next to the weights"
    return [file for file in prepared.files if file.name != CARD], [note]


def _check_remote(api: HfApi, repo_id: str, revision: str, additions: list[CommitOperationAdd], token: str) -> None:
    """Raise HubError unless the commit holds each file with the hash of the local one."""
    tree = ask(
        f"read {repo_id} back",
        repo_id,
        lambda: {
            file.path: file
            for file in api.list_repo_tree(repo_id, recursive=True, revision=revision)
            if isinstance(file, RemoteFile)
        },
        token,
    )
    wrong = [added.path_in_repo for added in additions if not _same(added, tree.get(added.path_in_repo))]
    if wrong:
        raise HubError(f"{repo_id}: {', '.join(wrong)} differs from the local file; push again, and please report it")


def _same(ours: CommitOperationAdd, theirs: RemoteFile | None) -> bool:
    if theirs is None:
        return False
    if theirs.lfs is not None:
        return theirs.lfs.sha256 == ours.upload_info.sha256.hex()
    with ours.as_file() as file:
        content = file.read()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return theirs.blob_id == blob.hexdigest()


def _read_card(path: Path) -> str:
    """Read a hand-written card; ArtifactError if it is not UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text (byte {error.start})") from error
