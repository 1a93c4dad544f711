"""A hub on 127.0.0.1 that speaks what `huggingface_hub` speaks to create, upload, commit and download, and can fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers import loopback_xet
from tests.helpers.card_rules import card_errors

TOKEN = "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"
NAMESPACE = "canary-org"
LARGE = (".safetensors", ".png", ".model")
"""What goes through LFS; the rest is in the commit itself."""
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Fault:
    """What happens to a request whose `METHOD /path` matches."""

    match: str
    status: int = 500
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "canned failure"
    cut: str | None = None
    """`before`: the connection ends in place of an answer; `after`: what was asked is done, but no answer comes."""
    silent: float = 0
    """Seconds without an answer, after which the connection ends."""
    answer: Any = None
    """The body of an answer that is no error."""
    html: bool = False
    """Whether a web page comes, as from the login page of a network."""
    then: Callable[[], None] | None = None
    """Called instead of any answer."""
    seen: int = 0


@dataclass
class Repo:
    """A repository: visibility, and its commits with all their files."""

    private: bool
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    """Of all branches, with all their files."""
    branches: dict[str, str] = field(default_factory=dict)
    """The head of each."""

    @property
    def head(self) -> str:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return dict(self.commits)[self.head]

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode(), usedforsecurity=False).hexdigest()
        self.commits.append((oid, files))
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> str:
        """The commit that a branch, or the hash of a commit, stands for."""
        oid = self.branches.get(revision, revision)
        if oid not in dict(self.commits):
            raise Answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        return oid


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Answer(Exception):  # noqa: N818 - none is wrong
    """Ends a request."""

    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}


class LoopbackHub:
    """The state of the hub, and its server; a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.blocks: dict[str, bytes] = {}
        self.store_url: str | None = None
        """Where the store of large files is; None: here."""
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received = b""
        """Everything that was ever sent here, but for the header with the token."""
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add_repo(self, name: str, *, private: bool = True) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return repo

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, one) is not None for one in self.requests)

    # Requests, each by a method named in ROUTES

    def create(self, body: Any, **_: Any) -> None:
        name = f"{body['organization'] or NAMESPACE}/{body['name']}"
        if body["organization"] not in (None, NAMESPACE):
            raise Answer(403, {"error": f"You don't have the rights to create a model under {body['organization']}"})
        if name in self.repos:
            raise Answer(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        self.add_repo(name, private=body.get("visibility") == "private")
        raise Answer(200, {"url": f"{self.url}/{name}"})

    def whoami(self, **_: Any) -> None:
        raise Answer(200, {"type": "user", "name": NAMESPACE, "orgs": []})

    def validate_yaml(self, body: Any, **_: Any) -> None:
        errors = [{"message": one} for one in card_errors(body["content"])]
        raise Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, repo: Repo, name: str, revision: str = "main", **_: Any) -> None:
        head = repo.at(revision)
        files = [{"rfilename": path} for path in sorted(dict(repo.commits)[head])]
        raise Answer(200, {"id": name, "sha": head, "private": repo.private, "siblings": files, "tags": []})

    def branch(self, repo: Repo, branch: str, body: Any, **_: Any) -> None:
        repo.branches[branch] = repo.at(body.get("startingPoint") or "main")
        raise Answer(200, {})

    def preupload(self, repo: Repo, body: Any, branch: str = "main", **_: Any) -> None:
        answers = []
        for one in body["files"]:
            large = one["path"].endswith(LARGE)
            there = dict(repo.commits)[repo.at(branch)].get(one["path"])
            oid = None if there is None else sha256(there) if large else blob_id(there)
            mode = "lfs" if large else "regular"
            answers.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": answers})

    def batch(self, body: Any, **_: Any) -> None:
        objects = []
        for one in body["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}?signature=canary", "header": {}}}
            objects.append(answer)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, raw: bytes, oid: str, **_: Any) -> None:
        if sha256(raw) != oid:
            raise Answer(400, {"error": "wrong content"})
        self.objects[oid] = raw
        raise Answer(200)

    def store_token(self, **_: Any) -> None:
        address, end = self.store_url or self.url, str(int(time.time()) + 3600)
        body = {"accessToken": loopback_xet.TOKEN, "exp": int(end), "casUrl": address}
        headers = {"Cas-Url": address, "Access-Token": loopback_xet.TOKEN, "Token-Expiration": end}
        raise Answer(200, body, {f"X-Xet-{key}": value for key, value in headers.items()})

    def block(self, raw: bytes, oid: str, **_: Any) -> None:
        self.blocks[oid] = raw
        raise Answer(200, {"was_inserted": True})

    def shard(self, raw: bytes, **_: Any) -> None:
        for content in loopback_xet.files_in(raw, self.blocks):
            self.objects[sha256(content)] = content
        raise Answer(200, {"result": 1})

    def commit(self, repo: Repo, name: str, raw: bytes, branch: str = "main", query: str = "", **_: Any) -> None:
        lines = [json.loads(line) for line in raw.splitlines()]
        assert lines[0]["key"] == "header"
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.at(branch):
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(dict(repo.commits)[repo.at(branch)])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
                self.received += files[value["path"]]
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        pull = "create_pr=1" in query
        oid = repo.commit(files, "refs/pr/1" if pull else branch)
        answer = {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}
        raise Answer(200, answer | ({"pullRequestUrl": f"{self.url}/{name}/discussions/1"} if pull else {}))

    def tree(self, repo: Repo, revision: str, **_: Any) -> None:
        entries = []
        for path, content in sorted(self._at(repo, revision).items()):
            entry: dict[str, Any] = {"type": "file", "oid": blob_id(content), "size": len(content), "path": path}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        raise Answer(200, entries)

    def resolve(self, repo: Repo, revision: str, path: str, **_: Any) -> None:
        files = self._at(repo, revision)
        if path not in files:
            raise Answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        etag = sha256(content) if path.endswith(LARGE) else blob_id(content)
        raise Answer(200, content, {"X-Repo-Commit": repo.at(revision), "ETag": f'"{etag}"'})

    def _at(self, repo: Repo, revision: str) -> dict[str, bytes]:
        return dict(repo.commits)[repo.at(revision)]


ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", LoopbackHub.create),
    (r"GET /api/whoami-v2", LoopbackHub.whoami),
    (r"POST /api/validate-yaml", LoopbackHub.validate_yaml),
    (rf"POST /api/models/{_REPO}/preupload/(?P<branch>.+)", LoopbackHub.preupload),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)", LoopbackHub.branch),
    (rf"GET /api/models/{_REPO}/xet-(read|write)-token/.+", LoopbackHub.store_token),
    (r"POST /v1/xorbs/\w+/(?P<oid>\w+)", LoopbackHub.block),
    (r"POST /v1/shards", LoopbackHub.shard),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", LoopbackHub.batch),
    (r"PUT /lfs/(?P<oid>\w+)", LoopbackHub.put),
    (rf"POST /api/models/{_REPO}/commit/(?P<branch>.+)", LoopbackHub.commit),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>\w+)", LoopbackHub.tree),
    (rf"GET /api/models/{_REPO}(/revision/(?P<revision>.+))?", LoopbackHub.info),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>\w+)/(?P<path>.+)", LoopbackHub.resolve),
]


class _Server(ThreadingHTTPServer):
    # A download opens many connections at once.
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error of a test's own code; a client that resets its connection, as the kit may, is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        line = f"{self.command} {unquote(urlsplit(self.path).path)}"
        fault = self._fault(line)
        if fault and fault.cut == "before":
            return self._cut()
        if fault and fault.silent:
            time.sleep(fault.silent)
            return self._cut()
        raw = self._body()
        if fault and fault.then:
            fault.then()
        with self.hub.lock:
            self.hub.requests.append(line)
            self.hub.received += raw
            if fault and fault.html:
                return self._answer(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
            if fault and fault.cut is None and fault.then is None:
                return self._answer(fault.status, fault.answer or {"error": fault.message}, fault.headers)
            try:
                self._route(line, raw)
            except Answer as answer:
                if fault:
                    return self._cut()
                return self._answer(answer.status, answer.body, answer.headers)
        return self._answer(404, {"error": "no such place"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fault(self, line: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if re.search(fault.match, line) and fault.seen < fault.times:
                    fault.seen += 1
                    return fault
        return None

    def _route(self, line: str, raw: bytes) -> None:
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, line):
                values = {key: value for key, value in match.groupdict().items() if value is not None}
                # Uploads go to a signed address, and a card is checked for anybody.
                token = loopback_xet.TOKEN if re.search("^POST /v1/", line) else TOKEN
                if not re.search("^PUT|validate-yaml", line) and self.headers.get("Authorization") != f"Bearer {token}":
                    raise Answer(401, {"error": "Invalid username or password."})
                if (name := values.pop("repo", None)) is not None:
                    if name not in self.hub.repos:
                        raise Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                    if self.hub.repos[name].gated and re.search("/tree/|/resolve/", line):
                        raise Answer(403, {"error": "Access is restricted."}, {"X-Error-Code": "GatedRepo"})
                    values |= {"repo": self.hub.repos[name], "name": name, "query": urlsplit(self.path).query}
                is_json = "json" in (self.headers.get("Content-Type") or "") and "ndjson" not in str(self.headers)
                method(self.hub, raw=raw, body=json.loads(raw) if raw and is_json else None, **values)

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
