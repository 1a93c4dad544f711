"""A push that the hub, the network or the user spoils: survived, or one message and nothing committed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import Result
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from lora_llava.errors import HubError
from lora_llava.system.hub.ask import ATTEMPTS, ask
from tests.helpers import loopback_hub
from tests.helpers.loopback_hub import TOKEN, Fault, LoopbackHub
from tests.helpers.publishing import ARTIFACT_FILES, REPO, push


def refused(result: Result, hub: LoopbackHub) -> str:
    """The one message of a push that ended, with nothing committed and no secret told."""
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    for secret in (TOKEN, "signature=canary", f"{hub.url}/api", f"{hub.url}/lfs"):
        assert secret not in result.output
    assert all(len(repo.commits) == 1 for repo in hub.repos.values())
    return result.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("/api/", 401, times=99), "the Hub rejects the token"),
        (Fault("commit/main", 403), f"the token may not write to {REPO}"),
        (Fault("GET /api/models", 404), f"{REPO} does not exist"),
        (Fault("commit/main", 409), "another operation"),
        (Fault("commit/main", 412), "somebody else committed"),
        (Fault("validate-yaml", 429, headers={"Retry-After": "86400"}), "asks to wait 86400 seconds"),
        (Fault("commit/main", 429, times=99), "too many requests, after 4 attempts"),
        (Fault("commit/main", 503, times=99), "the Hub failed 4 times"),
        (Fault("preupload", 500, times=99), "the Hub failed 4 times"),
        (Fault("commit/main", cut="before", times=99), "the connection to the Hub failed"),
        (Fault("GET /api/models", 418, message=f"no {TOKEN}, http://x.y/?signature=canary"), "The Hub says: no ..."),
    ],
    ids=lambda one: f"{one.match}-{one.cut or one.status}" if isinstance(one, Fault) else "",
)
def test_a_push_that_fails_ends_in_one_message(
    hub: LoopbackHub, artifact: Path, waits: list[float], fault: Fault, message: str
) -> None:
    _fails_once_and_works_again(hub, artifact, waits, fault, message)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("PUT /lfs", 429, headers={"Retry-After": "86400"}), "asks to wait 86400 seconds"),
        (Fault("PUT /lfs", 500, times=99), "the store for large files keeps failing (500)"),
        (Fault("PUT /lfs", 403), "the store for large files refuses (403)"),
        (Fault("PUT /lfs", cut="before", times=99), "the connection failed in every attempt"),
    ],
    ids=lambda one: f"{one.match}-{one.cut or one.status}" if isinstance(one, Fault) else "",
)
@pytest.mark.usefixtures("without_xet")
def test_so_does_one_to_the_older_store(
    hub: LoopbackHub, artifact: Path, waits: list[float], fault: Fault, message: str
) -> None:
    _fails_once_and_works_again(hub, artifact, waits, fault, message)


def _fails_once_and_works_again(
    hub: LoopbackHub, artifact: Path, waits: list[float], fault: Fault, message: str
) -> None:
    hub.add_repo(REPO)
    hub.faults.append(fault)
    assert message in refused(push(artifact), hub)
    assert sum(waits) < 120
    # What is repeated is bounded: here, and inside huggingface_hub, whose own requests are made up to 6 times.
    assert fault.seen <= ATTEMPTS * 6
    hub.faults.clear()
    assert push(artifact).exit_code == 0
    assert hub.repos[REPO].files.keys() == ARTIFACT_FILES


@pytest.mark.parametrize("fault", [Fault("HEAD", 503), Fault("GET .*resolve", cut="before")], ids=["503", "cut"])
def test_the_card_there_is_read_through_failures(
    hub: LoopbackHub, artifact: Path, waits: list[float], fault: Fault
) -> None:
    assert push(artifact).exit_code == 0
    hub.faults.append(fault)
    again = push(artifact)
    assert again.exit_code == 0, again.output
    assert fault.seen == 1
    assert "nothing to do" in again.stdout
    hub.faults.append(Fault("resolve", 503, times=99))
    gone = push(artifact)
    assert "cannot read the card of" in gone.stderr
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault("commit/main", 429, headers={"Retry-After": "7"}), 7),
        (Fault("preupload", 429, headers={"Retry-After": "7"}), 8),
        (Fault("commit/main", 503), 1),
        (Fault("POST /v1/xorbs", 502), 0),
        (Fault("POST /v1/xorbs", cut="before"), 0),
        (Fault("POST /v1/shards", 503), 0),
        (Fault("repos/create", cut="after"), 1),
        (Fault("commit/main", cut="before"), 1),
        (Fault("commit/main", cut="after"), 1),
        (Fault("tree/", 500), 1),
    ],
    ids=lambda one: f"{one.match}-{one.cut or one.status}" if isinstance(one, Fault) else "",
)
def test_a_failure_that_passes_is_survived(
    hub: LoopbackHub, artifact: Path, waits: list[float], fault: Fault, waited: float
) -> None:
    hub.faults.append(fault)
    result = push(artifact)
    assert result.exit_code == 0, result.output
    assert sum(waits) == waited
    assert TOKEN not in result.output
    repo = hub.repos[REPO]
    assert repo.files.keys() == ARTIFACT_FILES
    # One commit, even where the answer to it was lost.
    assert len(repo.commits) == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError(f"PUT https://store/?signature=canary {TOKEN}"),
            "cannot look: the connection failed in every attempt (RuntimeError)",
        ),
        (ConnectionResetError(TOKEN), "failed (ConnectionResetError), 4 times"),
        (OfflineModeIsEnabled(TOKEN), "HF_HUB_OFFLINE is set"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_errors_below_http_are_one_message_too(waits: list[float], error: Exception, expected: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(HubError) as raised:
        ask("look", "a/b", fail, TOKEN)
    assert expected in str(raised.value)
    assert "canary" not in str(raised.value)


def test_a_mistake_of_the_program_is_not_taken_for_the_network(waits: list[float]) -> None:
    def fail() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        ask("look", "a/b", fail, TOKEN)
    assert not waits


def test_a_lost_answer_to_a_removal_is_survived(
    hub: LoopbackHub, artifact: Path, tmp_path: Path, waits: list[float]
) -> None:
    copied = shutil.copytree(artifact, tmp_path / "run" / "instruct")
    (copied / "added_tokens.json").write_text("{}", encoding="utf-8")
    assert push(copied).exit_code == 0
    (copied / "added_tokens.json").unlink()
    hub.faults.append(Fault("commit/main", cut="after"))
    result = push(copied)
    assert result.exit_code == 0, result.output
    assert "removed, from an earlier push: added_tokens.json" in result.stdout
    assert hub.repos[REPO].files.keys() == ARTIFACT_FILES
    assert len(hub.repos[REPO].commits) == 3


def test_a_race_is_seen(hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody commits after the push has looked and before it commits."""
    repo = hub.add_repo(REPO)
    original = hub.preupload

    def meanwhile(**how: object) -> None:
        if len(repo.commits) == 1:
            repo.commit({**repo.files, "other.txt": b"theirs"})
        original(**how)  # type: ignore[arg-type]

    monkeypatch.setattr(LoopbackHub, "preupload", lambda _, **how: meanwhile(**how))
    routes = [(one, LoopbackHub.preupload if "preupload" in one else method) for one, method in loopback_hub.ROUTES]
    monkeypatch.setattr(loopback_hub, "ROUTES", routes)
    result = push(artifact)
    assert result.exit_code == 1
    assert "somebody else committed" in result.stderr
    assert repo.files.keys() == {".gitattributes", "other.txt"}
    assert "kept, not from lora-llava: other.txt" in push(artifact).stdout
    assert repo.files["other.txt"] == b"theirs"


def test_what_a_push_refuses_to_do(
    hub: LoopbackHub, artifact: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "namespace" in refused(push(artifact, repo="somebody-else/tiny"), hub)
    hub.add_repo(REPO, private=False)
    assert "exists and is public. Give --public" in refused(push(artifact), hub)
    assert "neither an artifact" in refused(push(tmp_path), hub)
    assert "is not a repository name" in refused(push(artifact, repo="a/b/c"), hub)
    assert "was not written by the run" in refused(push(artifact, "--run", str(tmp_path)), hub)
    copied = shutil.copytree(artifact, tmp_path / "run" / "instruct")
    for text, message in (
        (f"---\nlicense: mit\n---\nI am {TOKEN}\n", "README.md, line 4, contains an access token"),
        ("---\nlicense: mit\n---\nsee ../../home/me/x\n", "README.md, line 4, contains a path of this machine"),
        ("---\nlicense: mine\n---\n", "is not a license id of the Hub"),
        ("---\nlicense: [\n---\n", "cannot be read"),
    ):
        (copied / "README.md").write_text(text, encoding="utf-8")
        assert message in refused(push(copied), hub)
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(push(artifact), hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no access token" in refused(push(artifact), hub)
    assert len(hub.requests) == before
