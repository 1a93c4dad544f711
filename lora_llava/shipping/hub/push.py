"""A push, from top to bottom: look, create, compare, commit, check."""

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
    """Everything that goes up, decided and checked before the first request."""

    repo_id: str
    files: list[RepoFile]
    """The card among them."""
    left_out: list[str]
    card: str
    own_card: bool
    """Whether the card is the directory's own README.md."""
    needs_local_base: bool


def prepare(source: Path, repo_id: str, *, run: Path | None = None, samples: bool = True) -> Prepared:
    """Decide what of `source`, an artifact or a model, goes up to `repo_id`; asks nothing of the network.

    `run`: directory of its run, for results and pictures. Raises ArtifactError or HubError for what cannot go up.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository: {error} Give it as NAMESPACE/NAME.") from error
    facts = gather(source, run)
    if not samples:
        facts.pictures.pop("samples.png", None)
    content = collect(facts)
    own = source / CARD
    if own.is_file():
        card = read_card(own)
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
    """Create the repository if need be, and commit to it what is not there yet. Returns what to tell.

    Private unless `public`. Nothing appears before all of it is there: it is one commit, on the state that was looked
    at. Files of an earlier push that this one has no more are removed; others are left alone. Raises HubError.
    """
    refuse_offline()
    token = get_token()
    if token is None:
        raise HubError("there is no access token. Log in with: hf auth login, or set HF_TOKEN")
    api = HfApi(token=token, library_name="lora-llava")
    wanted = prepared.repo_id
    url = ask(f"create {wanted}", wanted, lambda: api.create_repo(wanted, private=not public, exist_ok=True), token)
    repo_id = url.repo_id
    info = ask(f"look at {repo_id}", repo_id, lambda: api.model_info(repo_id), token)
    if not info.private and not public:
        raise HubError(f"{repo_id} exists and is public. Give --public to publish there, or another name")
    files, lines = _with_card(prepared, api, info, token)
    names = {file.name for file in files}
    stale = sorted(name for name in _names(info) - names if is_ours(name))
    additions: list[CommitOperationAdd] = []

    def commit() -> str:
        # Made anew for each attempt: the one before may have been done, and only its answer lost.
        now = _names(api.model_info(repo_id))
        additions[:] = [CommitOperationAdd(file.name, file.content) for file in files]
        deletions = [CommitOperationDelete(name) for name in stale if name in now]
        return api.create_commit(
            repo_id,
            [*additions, *deletions],
            commit_message="Upload with lora-llava",
            parent_commit=info.sha,
        ).oid

    oid = ask(f"commit to {repo_id}", repo_id, commit, token)
    _check_remote(api, repo_id, oid, additions, token)
    seen = "private" if info.private else "public"
    if oid == info.sha:
        lines.insert(0, f"{url}: nothing to do, its {len(files)} files are there already ({seen}, commit {oid[:8]})")
        return lines
    lines.insert(0, f"{url}: {len(files)} files, {seen}, commit {oid[:8]}; their hashes there are those here")
    if stale:
        lines.append(f"removed, of an earlier push: {', '.join(stale)}")
    if kept := sorted(_names(info) - names - set(stale) - {_ATTRIBUTES, CARD}):
        lines.append(f"left alone, not of the kit: {', '.join(kept)}")
    return lines


def _names(info: ModelInfo) -> set[str]:
    return {one.rfilename for one in info.siblings or []}


def _with_card(prepared: Prepared, api: HfApi, info: ModelInfo, token: str) -> tuple[list[RepoFile], list[str]]:
    """Leave the card out if the one on the Hub was written or edited there by hand; a README.md here wins."""
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
    kept = f"kept: {CARD} on the Hub, which was edited there. To replace it put your own {CARD} beside the weights"
    return [file for file in prepared.files if file.name != CARD], [kept]


def _check_remote(api: HfApi, repo_id: str, revision: str, additions: list[CommitOperationAdd], token: str) -> None:
    """Raise HubError unless each file is in the commit with the hash that it has here."""
    tree = ask(
        f"read {repo_id} back",
        repo_id,
        lambda: {
            one.path: one
            for one in api.list_repo_tree(repo_id, recursive=True, revision=revision)
            if isinstance(one, RemoteFile)
        },
        token,
    )
    wrong = [one.path_in_repo for one in additions if not _same(one, tree.get(one.path_in_repo))]
    if wrong:
        raise HubError(f"{repo_id}: {', '.join(wrong)} is not there as it is here; push again, and please report it")


def _same(ours: CommitOperationAdd, theirs: RemoteFile | None) -> bool:
    if theirs is None:
        return False
    if theirs.lfs is not None:
        return theirs.lfs.sha256 == ours.upload_info.sha256.hex()
    with ours.as_file() as file:
        content = file.read()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return theirs.blob_id == blob.hexdigest()


def read_card(path: Path) -> str:
    """Read a card that was written by hand; ArtifactError if it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text (byte {error.start})") from error
