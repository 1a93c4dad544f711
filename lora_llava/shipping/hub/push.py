"""Push to the Hub, top to bottom: open the repository, compare, upload, commit, verify."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token, is_offline_mode
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile as RemoteFile

from lora_llava.errors import HubError
from lora_llava.shipping.hub.card import is_unedited
from lora_llava.shipping.hub.content import CARD, RepoFile, is_ours
from lora_llava.shipping.hub.prepare import Prepared, prepare
from lora_llava.system.hub.ask import ATTEMPTS, UnansweredError, ask
from lora_llava.system.hub.store import watched_upload
from lora_llava.system.text import counted

_ATTRIBUTES = ".gitattributes"
_NOTHING = "Nothing was committed."
_AGAIN = "Push again: what was uploaded is not sent twice."


@dataclass(frozen=True, slots=True)
class Target:
    """Where in its repository a push goes."""

    public: bool = False
    """Whether a new repository is public, and an existing one may be."""
    revision: str | None = None
    """Branch, which is created if it does not exist; None: the main one."""
    create_pr: bool = False
    """Whether to open a pull request instead of committing to the main branch."""


@dataclass(frozen=True, slots=True)
class _Remote:
    """The repository as it was before the push."""

    api: HfApi
    token: str
    info: ModelInfo
    url: str
    target: Target
    created: bool

    @property
    def id(self) -> str:
        """NAMESPACE/NAME."""
        return self.info.id

    @property
    def names(self) -> set[str]:
        """Names of its files."""
        return {file.rfilename for file in self.info.siblings or []}

    def tree(self, revision: str | None) -> dict[str, RemoteFile]:
        """Ask for the files of a revision, by name."""
        entries = self.api.list_repo_tree(self.id, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RemoteFile)}


def publish(
    model: Path | str,
    repo_id: str,
    *,
    public: bool = False,
    run: Path | None = None,
    samples: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> list[str]:
    """Publish an artifact or a model on the Hugging Face Hub as `repo_id`, as `lora-llava push` does.

    Private unless `public`. `run`: directory of its run, for the card's results and plots; None: the one that the
    artifact is in. `samples`: also upload samples.png, which shows test images. `revision`: branch; `create_pr`: open a
    pull request. Returns lines that say what was sent. Raises ArtifactError or HubError.
    """
    prepared = prepare(Path(model), full_name(repo_id), run=run, samples=samples)
    return push(prepared, Target(public, revision, create_pr))


def full_name(repo_id: str) -> str:
    """Return `repo_id` with the namespace of the token's owner, if it has none. Raises HubError."""
    if "/" in repo_id:
        return repo_id
    token = _token()
    api = HfApi(token=token, library_name="lora-llava")
    return f"{ask('ask who you are', repo_id, api.whoami, token)['name']}/{repo_id}"


def _token() -> str:
    """Return the access token. Raises HubError if there is none, or if it cannot be one."""
    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or preview with --dry-run")
    token = get_token()
    if token is None:
        raise HubError("there is no access token. Log in with: hf auth login, or set HF_TOKEN")
    if odd := re.search(r"[^!-~]", token):
        raise HubError(
            f"the access token has a character that no token has (U+{ord(odd[0]):04X}, number {odd.start() + 1} of "
            f"{len(token)}), perhaps from copying. Log in again with: hf auth login, or correct HF_TOKEN"
        )
    return token


def push(prepared: Prepared, target: Target = Target()) -> list[str]:
    """Create the repository if it does not exist, and commit what it lacks. Returns the lines to show.

    All files appear at once, in one commit on the revision that was compared. Files of an earlier push that this one
    lacks are removed; other files stay. HubError and KeyboardInterrupt say in which state they leave the repository.
    """
    if target.create_pr and target.revision is not None:
        raise HubError("a pull request goes to the main branch; leave --revision or --create-pr out")
    token = _token()
    remote = _open(HfApi(token=token, library_name="lora-llava"), prepared.repo_id, target, token)
    left = (
        f" An empty repository was created at {remote.url}: delete it there, or push again." if remote.created else ""
    )
    with _errors_with(f"{_NOTHING}{left}"):
        files, lines = _with_card(prepared, remote)
        names = {file.name for file in files}
        stale = sorted(name for name in remote.names - names if is_ours(name))
        additions = _changed(files, remote)
    where = _where(remote)
    if not additions and not stale:
        present = f"nothing to do, its {len(files)} files are there already"
        return [f"{remote.url}: {present} ({where}, commit {str(remote.info.sha)[:8]})", *lines]
    with _errors_with(f"{_NOTHING}{left or f' {_AGAIN}'}"):
        ask(f"upload the files of {remote.id}", remote.id, lambda: _upload(remote, additions), token)
    oid, url = _commit(remote, additions, stale, left)
    _check_remote(remote, oid, additions)
    lines.insert(0, f"{url}: {len(files)} files, {where}, commit {oid[:8]}; their hashes match the local files")
    if stale:
        lines.append(f"removed, from an earlier push: {', '.join(stale)}")
    if others := sorted(remote.names - names - set(stale) - {_ATTRIBUTES, CARD}):
        lines.append(f"kept, not from lora-llava: {', '.join(others)}")
    return lines


@contextmanager
def _errors_with(state: str) -> Iterator[None]:
    """Add the state of the repository to a HubError, or to an interruption, inside the `with` block."""
    try:
        yield
    except HubError as error:
        raise HubError(f"{str(error).rstrip('.')}. {state}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped. {state}") from None


def _where(remote: _Remote) -> str:
    """Return the visibility of the repository, and the branch if it is not the main one."""
    branch = f"branch {remote.target.revision}" if remote.target.revision else ""
    return ", ".join(filter(None, ["private" if remote.info.private else "public", branch]))


def _open(api: HfApi, name: str, target: Target, token: str) -> _Remote:
    """Look at the repository, and at its branch; create what does not exist. Raises HubError for another visibility."""
    with _errors_with(_NOTHING):
        info = ask(f"look at {name}", name, lambda: _look(api, name), token)
        created = info is None
        if info is None:
            if target.create_pr:
                raise HubError(
                    f"{name} does not exist, or the token may not read it, so there is no pull request to it"
                )
            url = ask(
                f"create {name}", name, lambda: api.create_repo(name, private=not target.public, exist_ok=True), token
            )
            name = url.repo_id
            info = ask(f"look at {name}", name, lambda: api.model_info(name), token)
        url_of = f"{api.endpoint}/{info.id}"
        if not info.private and not target.public:
            raise HubError(f"{name} exists and is public. Give --public to publish there, or use another name")
        if info.private and target.public:
            raise HubError(
                f"{name} exists and is private, and --public is for a new repository. Leave it out, or first make the "
                f"repository public at {url_of}/settings"
            )
        branch = target.revision
        if branch is not None:
            start = info.sha
            info = ask(f"look at {branch} of {name}", name, lambda: _branch(api, name, branch, start), token)
    return _Remote(api, token, info, url_of, target, created)


def _look(api: HfApi, name: str) -> ModelInfo | None:
    try:
        return api.model_info(name)
    except RepositoryNotFoundError:
        return None


def _branch(api: HfApi, name: str, branch: str, start: str | None) -> ModelInfo:
    """Return the state of a branch; create it at commit `start` if it does not exist."""
    try:
        return api.model_info(name, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(name, branch=branch, revision=start, exist_ok=True)
        return api.model_info(name, revision=branch)


def _changed(files: list[RepoFile], remote: _Remote) -> list[CommitOperationAdd]:
    """Return the files that the repository lacks, or has with another content."""
    present = {} if remote.created else _tree(remote, remote.info.sha, f"read {remote.id}")
    additions = [CommitOperationAdd(file.name, file.content) for file in files]
    return [added for added in additions if not _same(added, present.get(added.path_in_repo))]


def _upload(remote: _Remote, additions: list[CommitOperationAdd]) -> None:
    """Upload the large files among `additions` to their store; the commit will refer to them."""
    target = remote.target
    with watched_upload():
        remote.api.preupload_lfs_files(
            remote.id, additions, revision=target.revision, create_pr=target.create_pr, free_memory=False
        )


def _commit(remote: _Remote, additions: list[CommitOperationAdd], stale: list[str], left: str) -> tuple[str, str]:
    """Commit; return the commit's hash and where to look at it. What was uploaded is not uploaded again."""
    tried = False

    def commit() -> tuple[str, str]:
        nonlocal tried
        # An earlier attempt may have succeeded, and only its answer been lost.
        if tried and (head := _our_commit(remote, additions, stale)):
            return head, remote.url
        tried = True
        done = remote.api.create_commit(
            remote.id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message="Upload with lora-llava",
            revision=remote.target.revision,
            create_pr=remote.target.create_pr,
            parent_commit=None if remote.target.create_pr else remote.info.sha,
        )
        return done.oid, done.pr_url or remote.url

    page = "discussions" if remote.target.create_pr else f"commits/{remote.target.revision or 'main'}"
    unknown = (
        f"It is unknown whether the commit was made: look at {remote.url}/{page}, or push again, which compares first"
    )
    # A second pull request would be opened if the answer to the first were lost.
    attempts = 1 if remote.target.create_pr else ATTEMPTS
    try:
        return ask(f"commit to {remote.id}", remote.id, commit, remote.token, attempts=attempts)
    except UnansweredError as error:
        raise HubError(f"{error}. {unknown}") from error
    except HubError as error:
        raise HubError(f"{str(error).rstrip('.')}. {_NOTHING}{left or f' {_AGAIN}'}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped while committing. {unknown}") from None


def _our_commit(remote: _Remote, additions: list[CommitOperationAdd], stale: list[str]) -> str | None:
    """Return the head of the branch if it is the commit of this push; None otherwise."""
    head = remote.api.model_info(remote.id, revision=remote.target.revision).sha
    if head is None or head == remote.info.sha:
        return None
    files = remote.tree(head)
    holds_all = all(_same(added, files.get(added.path_in_repo)) for added in additions)
    return head if holds_all and not files.keys() & {*stale} else None


def _with_card(prepared: Prepared, remote: _Remote) -> tuple[list[RepoFile], list[str]]:
    """Leave the card out if the one on the Hub was edited by hand; a local README.md replaces it."""
    if prepared.own_card or CARD not in remote.names:
        return prepared.files, []
    with tempfile.TemporaryDirectory() as directory:
        path = ask(
            f"read the card of {remote.id}",
            remote.id,
            lambda: remote.api.hf_hub_download(remote.id, CARD, revision=remote.info.sha, local_dir=directory),
            remote.token,
        )
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    if is_unedited(text):
        return prepared.files, []
    note = f"kept: {CARD} on the Hub, which was edited there. To replace it, put your own {CARD} next to the weights"
    return [file for file in prepared.files if file.name != CARD], [note]


def _tree(remote: _Remote, revision: str | None, what: str) -> dict[str, RemoteFile]:
    return ask(what, remote.id, lambda: remote.tree(revision), remote.token)


def _check_remote(remote: _Remote, revision: str, additions: list[CommitOperationAdd]) -> None:
    """Raise HubError, which says that the commit was made, unless it holds each file with the hash of the local one."""
    committed = f"The commit was made ({remote.url}/commit/{revision})"
    check = "look at it there, or push again, which compares, and sends only what differs"
    try:
        tree = _tree(remote, revision, f"read {remote.id} back")
    except HubError as error:
        raise HubError(
            f"{committed}, but its files were not compared with the local ones: {error}. To compare, {check}"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped. {committed}, but its files were not compared; {check}") from None
    wrong = [added.path_in_repo for added in additions if not _same(added, tree.get(added.path_in_repo))]
    if wrong:
        raise HubError(
            f"{committed}, but {counted(len(wrong), 'file')} there differ from the local ones: {', '.join(wrong)}. "
            "Push again, and please report it"
        )


def _same(ours: CommitOperationAdd, theirs: RemoteFile | None) -> bool:
    if theirs is None:
        return False
    if theirs.lfs is not None:
        return theirs.lfs.sha256 == ours.upload_info.sha256.hex()
    with ours.as_file() as file:
        content = file.read()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return theirs.blob_id == blob.hexdigest()
