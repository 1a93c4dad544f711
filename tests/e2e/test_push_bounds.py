"""Every wait of a push ends within its bound, in the words of what failed; Xet is on, as users have it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lora_llava.system.hub.network import Bounds
from tests.helpers.loopback_hub import NAMESPACE, TOKEN, Fault, LoopbackHub
from tests.helpers.publishing import ARTIFACT_FILES, REPO, push

NEVER = 30.0
"""Seconds of silence: longer than any scaled bound."""
OVERHEAD = 3.0
"""Seconds for everything that is no wait, on a busy machine."""
QUOTA = "Private repository storage limit reached, please upgrade your plan"
HOST = "(Xet, 127.0.0.1)"


def silent(match: str) -> Fault:
    return Fault(match, silent=NEVER, times=99)


def failing(match: str, status: int = 500, message: str = "canned failure") -> Fault:
    return Fault(match, status, times=99, message=message)


def page(match: str) -> Fault:
    return Fault(match, html=True, times=99)


@pytest.mark.parametrize(
    ("fault", "message", "unanswered"),
    [
        (silent("v1/shards"), "(Xet) does not answer: no progress for 4 seconds. A firewall may block it", 4),
        (silent("GET /api/models"), "cannot look at canary-org/tiny: the Hub did not answer within 1 seconds", 2),
        (silent("commit/main"), "the Hub did not answer within 1 seconds (ReadTimeout)", 2),
        (silent("preupload"), "the Hub gave no good answer for", 2),
        (silent("xet-write-token"), f"the store for large files {HOST} does not answer, once", 2),
        (silent("v1/xorbs"), f"the store for large files {HOST} does not answer, once", 2),
        (failing("v1/xorbs"), f"the store for large files {HOST} keeps failing (500), 4 times", 0),
        (failing("v1/shards", 503), f"the store for large files {HOST} keeps failing (503), 4 times", 0),
        (failing("xet-write-token"), "the Hub failed 4 times. Try again later", 0),
        (failing("preupload", 503), "the Hub gave no good answer for", 0),
    ],
    ids=lambda value: value.match if isinstance(value, Fault) else "",
)
def test_k52_every_wait_is_bounded(
    hub: LoopbackHub,
    artifact: Path,
    short_bounds: Bounds,
    fault: Fault,
    message: str,
    unanswered: int,
) -> None:
    hub.add_repo(REPO)
    hub.faults.append(replace(fault))
    start = time.monotonic()
    result = push(artifact)
    seconds = time.monotonic() - start
    assert result.exit_code == 1
    assert message in result.stderr
    waits = short_bounds.retry_delay * 7 + short_bounds.patience
    assert seconds < unanswered * short_bounds.answer + waits + OVERHEAD
    assert len(hub.repos[REPO].commits) == 1


def test_k52_a_store_at_a_closed_port(hub: LoopbackHub, artifact: Path, short_bounds: Bounds) -> None:
    hub.store_url = "http://127.0.0.1:1"
    start = time.monotonic()
    result = push(artifact)
    seconds = time.monotonic() - start
    assert f"the store for large files {HOST} does not answer, 4 times. A firewall may block it" in result.stderr
    assert seconds < short_bounds.retry_delay * 7 + short_bounds.patience + OVERHEAD


def test_k52_the_bounds_are_those_that_the_page_states() -> None:
    text = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    bounds = Bounds()
    assert f"{bounds.answer:.0f} seconds without an answer" in text
    assert f"{bounds.store_silence:.0f} seconds without progress" in text
    assert f"within {bounds.store_answer:.0f}" in text
    assert (1 + bounds.store_retries) * bounds.store_answer + bounds.store_delay < bounds.store_silence
    assert f"{bounds.rate_limit:.0f} seconds in total" in text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            failing("xet-write-token", 403, "Forbidden"),
            "the Hub gives no access to its store for large files: the token may not write to canary-org/tiny (403)",
        ),
        (failing("xet-write-token", 403, QUOTA), "the account's storage on the Hub is used up (403)"),
        (failing("commit/main", 403, QUOTA), "the account's storage on the Hub is used up (403)"),
        (failing("v1/xorbs", 403), f"the store for large files {HOST} refuses the upload (403). A proxy may block it"),
        (failing("v1/shards", 400), f"the store for large files {HOST} refuses the list of what was uploaded (400)"),
        (page("GET /api/models"), "a web page came instead of the Hub's answer, as from the login page of a network"),
        (page("commit/main"), "a web page came instead of the Hub's answer"),
        (page("xet-write-token"), "a web page came instead of the Hub's answer"),
    ],
    ids=lambda value: f"{value.match}-{value.message[:5]}" if isinstance(value, Fault) else "",
)
def test_k53_each_refusal_in_its_own_words(
    hub: LoopbackHub, artifact: Path, short_bounds: Bounds, fault: Fault, message: str
) -> None:
    hub.add_repo(REPO)
    hub.faults.append(replace(fault))
    start = time.monotonic()
    result = push(artifact)
    seconds = time.monotonic() - start
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Nothing was committed" in result.stderr
    assert result.stderr.count("\n") == 1
    # At once: no further attempt can help.
    assert seconds < short_bounds.answer + OVERHEAD


@pytest.mark.usefixtures("without_xet", "short_bounds")
def test_k53_an_error_for_one_file_in_the_older_store(hub: LoopbackHub, artifact: Path) -> None:
    refused = {"oid": "a" * 64, "size": 1, "error": {"code": 422, "message": "no room for this"}}
    hub.faults.append(Fault("objects/batch", 200, times=99, answer={"objects": [refused]}))
    result = push(artifact)
    assert "the store for large files refuses:" in result.stderr
    assert "no room for this" in result.stderr
    assert result.stderr.count("\n") == 1


def test_k53_a_token_with_a_letter_that_no_token_has(
    hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_pässword")
    result = push(artifact)
    assert result.exit_code == 1
    assert "the access token has a character that no token has (U+00E4, number 5 of 11)" in result.stderr
    assert "ssword" not in result.output
    assert not hub.requests


@pytest.mark.parametrize("match", ["commit/main", "preupload", "GET /api/models"])
def test_k53_the_rate_limit_of_the_hub_is_waited_for(
    hub: LoopbackHub, artifact: Path, waits: list[float], match: str
) -> None:
    hub.faults.append(Fault(match, 429, headers={"RateLimit": '"api";r=0;t=20'}))
    result = push(artifact)
    assert result.exit_code == 0, result.output
    assert waits == [21]


def test_k53_a_rate_limit_beyond_the_bound_is_said(hub: LoopbackHub, artifact: Path, waits: list[float]) -> None:
    hub.faults.append(Fault("commit/main", 429, times=99, headers={"RateLimit": '"api";r=0;t=130'}))
    result = push(artifact)
    assert "the Hub asks to wait 131 seconds before the next request (429). Try again then" in result.stderr
    # The bound is on all of the waits together.
    assert waits == [131, 131]


def interrupt() -> None:
    """Press Ctrl-C, and give it time to arrive before any answer does."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)


def test_k51_a_commit_that_cannot_be_read_back_is_told_as_made(
    hub: LoopbackHub, artifact: Path, short_bounds: Bounds
) -> None:
    hub.faults.append(failing("tree/", 503))
    result = push(artifact)
    assert result.exit_code == 1
    repo = hub.repos[REPO]
    assert f"The commit was made ({hub.url}/{REPO}/commit/{repo.head})" in result.stderr
    assert "Nothing was committed" not in result.stderr
    assert "empty" not in result.stderr
    assert repo.files.keys() == ARTIFACT_FILES
    hub.faults.clear()
    assert "nothing to do" in push(artifact).stdout


@pytest.mark.parametrize("cut", ["before", "after"])
def test_k51_without_an_answer_to_the_commit_it_is_unknown(
    hub: LoopbackHub, artifact: Path, short_bounds: Bounds, cut: str
) -> None:
    hub.faults += [Fault("commit/main", cut=cut, times=99), Fault("revision/main|tree/", 503, times=99)]
    result = push(artifact)
    assert result.exit_code == 1
    assert f"It is unknown whether the commit was made: look at {hub.url}/{REPO}/commits/main" in result.stderr
    assert "Nothing was committed" not in result.stderr


def test_k51_ctrl_c_in_the_commit(hub: LoopbackHub, artifact: Path) -> None:
    hub.faults.append(Fault("commit/main", then=interrupt))
    result = push(artifact)
    assert result.exit_code == 130
    unknown = f"stopped while committing. It is unknown whether the commit was made: look at {hub.url}/{REPO}/commits"
    assert unknown in result.stderr


@pytest.mark.parametrize("match", ["preupload", "v1/xorbs"])
def test_k51_ctrl_c_before_the_commit(hub: LoopbackHub, artifact: Path, match: str) -> None:
    hub.faults.append(Fault(match, then=interrupt))
    result = push(artifact)
    assert result.exit_code == 130
    assert "stopped. Nothing was committed. An empty repository was created at" in result.stderr
    assert len(hub.repos[REPO].commits) == 1


def test_k54_a_name_without_a_namespace_is_completed(hub: LoopbackHub, artifact: Path) -> None:
    result = push(artifact, repo="tiny")
    assert result.exit_code == 0, result.output
    card = hub.repos[f"{NAMESPACE}/tiny"].files["README.md"].decode()
    assert f'from_pretrained("{NAMESPACE}/tiny")' in card
    assert '("tiny")' not in card
    assert f"hf download {NAMESPACE}/tiny" in card
    before = len(hub.requests)
    assert "the card will say NAMESPACE/tiny" in push(artifact, "--dry-run", repo="tiny").stdout
    assert len(hub.requests) == before


def test_k56_public_does_not_silently_stay_private(hub: LoopbackHub, artifact: Path) -> None:
    repo = hub.add_repo(REPO)
    result = push(artifact, "--public")
    assert result.exit_code == 1
    assert f"{REPO} exists and is private, and --public is for a new repository" in result.stderr
    assert f"{hub.url}/{REPO}/settings" in result.stderr
    assert (repo.private, len(repo.commits)) == (True, 1)


@pytest.mark.parametrize("existed", [False, True])
def test_k56_a_refused_push_says_which_empty_repository_it_left(
    hub: LoopbackHub, artifact: Path, existed: bool
) -> None:
    if existed:
        hub.add_repo(REPO)
    hub.faults.append(Fault("commit/main", 403))
    result = push(artifact)
    assert result.exit_code == 1
    left = f"An empty repository was created at {hub.url}/{REPO}: delete it there, or push again"
    assert (left in result.stderr) is not existed
    assert "Nothing was committed" in result.stderr


def test_k72_the_former_flag_is_taken_with_a_note(hub: LoopbackHub, artifact: Path) -> None:
    result = push(artifact, "--no-samples")
    assert result.exit_code == 0, result.output
    assert "note: --no-samples is the default now" in result.stderr


def test_a_branch_is_created_and_pushed_to(hub: LoopbackHub, artifact: Path) -> None:
    repo = hub.add_repo(REPO)
    before = repo.head
    result = push(artifact, "--revision", "v2")
    assert result.exit_code == 0, result.output
    assert "private, branch v2, commit" in result.stdout
    assert repo.head == before
    assert dict(repo.commits)[repo.branches["v2"]].keys() == ARTIFACT_FILES
    assert "nothing to do" in push(artifact, "--revision", "v2").stdout


def test_a_pull_request_is_opened(hub: LoopbackHub, artifact: Path) -> None:
    assert "does not exist" in push(artifact, "--create-pr").stderr
    assert not hub.repos
    repo = hub.add_repo(REPO)
    before = repo.head
    result = push(artifact, "--create-pr")
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/{REPO}/discussions/1: {len(ARTIFACT_FILES) - 1} files" in result.stdout
    assert repo.head == before
    assert dict(repo.commits)[repo.branches["refs/pr/1"]].keys() == ARTIFACT_FILES
    assert "leave --revision or --create-pr out" in push(artifact, "--create-pr", "--revision", "v2").stderr
    # A second one would be opened if the request were repeated.
    hub.faults.append(Fault("commit/main", cut="after"))
    assert "It is unknown whether the commit was made" in push(artifact, "--create-pr").stderr
    assert TOKEN not in result.output
