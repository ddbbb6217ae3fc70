"""A Hub on the loopback interface, small enough to read, for the real client of huggingface_hub.

It keeps repositories in memory, serves the routes that pulling and pushing use, and fails when it is told to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

MAIN = "main"


@dataclass
class Repo:
    """Commits by hash, and the newest commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = MAIN) -> str:
        """Makes `files` the whole content of a branch; returns the hash."""
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = MAIN) -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """What to do instead of answering: a status, "refuse" (hang up at once), "half" (hang up with half of what is
    sent not yet read) or "lose" (do it, then hang up).

    For a file's content, "cut" sends half of it, "more" sends it without its size and then a hundred times as much.
    "html" answers 200 with a page, as proxies do.
    """

    route: str
    action: int | str
    times: int
    headers: dict[str, str]


class HubServer:
    """The server; use it in a `with` block.

    Attributes:
        url: the endpoint.
        repos: by "user/name".
        requests: (method, path) of everything that was asked.
        writers: tokens that may write; None for everybody.
        sent: bytes of answers that are longer than announced.
        upload_mode: how contents are to be uploaded, "regular" (in the commit) or "lfs", for which there is no place.
        open: False once it has stopped answering.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.writers: set[str] | None = None
        self.upload_mode = "regular"
        self.sent = 0
        self.open = True
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False  # connections that are kept alive end, too
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> str:
        """A repository with one commit; returns the hash."""
        repo = self.repos.setdefault(name, Repo(**options))
        return repo.commit(files)

    def fail(self, route: str, action: int | str, times: int = 1, **headers: str) -> None:
        """Makes the next requests whose "METHOD path" matches the regular expression `route` fail."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._faults.append(Fault(route, action, times, named))

    def count(self, route: str) -> int:
        """How many requests matched a regular expression."""
        return sum(bool(re.search(route, f"{method} {path}")) for method, path in self.requests)

    def take_fault(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and re.search(fault.route, request):
                    fault.times -= 1
                    return fault
        return None


class _Answer(Exception):  # noqa: N818 (control flow: raised from any depth of a route)
    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)()", "info"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._respond()

    do_POST = do_HEAD = do_GET  # noqa: N815

    def _respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        fault = self.hub.take_fault(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length", 0))
        self.content = self.rfile.read(size // 2 if fault and fault.action == "half" else size)
        if not self.hub.open or (fault and fault.action in ("refuse", "half")):
            self.close_connection = True
            return
        try:
            if fault and isinstance(fault.action, int):
                raise _Answer(fault.action, {"error": f"told to answer {fault.action}"}, **fault.headers)
            if fault and fault.action == "html":
                raise _Answer(200, b"<html><body>Please log in</body></html>", Content_Type="text/html")
            self._route(path)
            raise _Answer(404, {"error": f"no route {path}"})
        except _Answer as answer:
            if fault and fault.action == "lose":
                self.close_connection = True
                return
            how = fault.action if fault and self.command == "GET" else None
            if how == "more":
                self._send_more(answer)
            else:
                self._send(answer, cut=how == "cut")

    def _route(self, path: str) -> None:
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                with self.hub._lock:
                    getattr(self, name)(*match.groups())

    def _send(self, answer: _Answer, cut: bool) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def _send_more(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):  # whoever reads may have had enough
            for _ in range(100):
                self.wfile.write(answer.body)
                self.hub.sent += len(answer.body)

    # Routes; each ends by raising its answer.

    def create_repo(self) -> None:
        request = json.loads(self.content)
        self._may_write()
        name = f"{request['organization']}/{request['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": url})
        self.hub.repos[name] = repo = Repo(
            private=request.get("visibility") == "private" or bool(request.get("private"))  # the latter before 2.0
        )
        repo.commit({".gitattributes": b""})
        raise _Answer(200, {"url": url})

    def validate_yaml(self) -> None:
        content = json.loads(self.content)["content"]
        if "license: nonsense" in content:
            raise _Answer(400, {"errors": [{"message": '"license" must be one of [mit, ...]'}], "warnings": []})
        raise _Answer(200, {"errors": [], "warnings": []})

    def create_branch(self, name: str, branch: str) -> None:
        self._may_write()
        repo = self._repo(name)
        if branch in repo.branches:
            raise _Answer(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches[MAIN]
        raise _Answer(200, {})

    def preupload(self, name: str, branch: str) -> None:
        self._may_write()
        present = self._repo(name).files(self._revision(name, branch))
        files = [
            {
                "path": file["path"],
                "uploadMode": self.hub.upload_mode,
                "shouldIgnore": False,
                "oid": _oid(present, file["path"]),
            }
            for file in json.loads(self.content)["files"]
        ]
        raise _Answer(200, {"files": files})

    def commit(self, name: str, branch: str) -> None:
        self._may_write()
        repo = self._repo(name)
        lines = [json.loads(line) for line in self.content.splitlines() if line]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.branches[branch]:
            raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repo.files(branch))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, branch)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        raise _Answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, name: str, revision: str) -> None:
        sha = self._revision(name, revision or MAIN)
        repo = self._repo(name)
        siblings = [{"rfilename": path} for path in repo.files(sha)]
        raise _Answer(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        files = self._repo(name).files(self._revision(name, revision))
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(files, path)}
            for path, content in files.items()
            if path.startswith(f"{folder}/" if folder else "")
        ]
        raise _Answer(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha = self._revision(name, revision)
        files = self._repo(name).files(sha)
        if path not in files:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        raise _Answer(200, files[path], ETag=f'"{_oid(files, path)}"', X_Repo_Commit=sha)

    # What several routes need.

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _may_write(self) -> None:
        if self.hub.writers is not None and self.token not in self.hub.writers:
            raise (
                _Answer(403, {"error": "You don't have the rights"})
                if self.token
                else _Answer(401, {"error": "Log in"})
            )

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            raise _Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repo

    def _revision(self, name: str, revision: str) -> str:
        repo = self._repo(name)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return sha


def _oid(files: dict[str, bytes], path: str) -> str | None:
    """The hash that git gives a file's content."""
    if path not in files:
        return None
    return hashlib.sha1(b"blob %d\0" % len(files[path]) + files[path]).hexdigest()
