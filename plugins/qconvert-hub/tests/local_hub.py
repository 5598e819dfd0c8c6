"""The part of the Hugging Face Hub's HTTP interface that downloads and commits need, on this machine, in memory."""

from __future__ import annotations

import base64
import json
import re
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
Files = dict[str, bytes]


class LocalHub(ThreadingHTTPServer):
    """repositories: "models/OWNER/NAME" or "datasets/OWNER/NAME" -> path -> content; each has the branch main alone.

    gated: repositories that nobody may read. created: what was asked for at the creation of a repository.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Files] = {}
        self.gated: set[str] = set()
        self.created: list[dict[str, Any]] = []
        self.commits: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision = match.groups()
            if self._refused(name, revision or "main"):
                return
            files = self.server.repositories[name]
            described = [{"type": "file", "path": key, "size": len(value), "oid": _oid(value)} for key, value in files.items()]
            siblings = [{"rfilename": key} for key in files]
            identity = name.partition("/")[2]
            self._answer(described if what == "tree" else {"id": identity, "sha": COMMIT, "siblings": siblings})
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, identity, revision, file = match.groups()
            name = f"{kind or 'models/'}{identity}"
            if self._refused(name, revision):
                return
            content = self.server.repositories[name].get(file)
            if content is None:
                self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            else:
                self._send(content, 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer({"error": f"no such page: {path}"}, 404)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if path == "/api/repos/create":
            asked = json.loads(body)
            identity = f"{asked['organization']}/{asked['name']}"
            if f"models/{identity}" in self.server.repositories:
                self._answer({"error": "You already created this model repo", "url": f"{self.server.url}/{identity}"}, 409)
                return
            self.server.created.append(asked)
            self.server.repositories[f"models/{identity}"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self._answer({"url": f"{self.server.url}/{identity}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/(models/[^/]+/[^/]+)/preupload/main", path):
            asked = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in asked]})
        elif match := re.fullmatch(r"/api/(models/[^/]+/[^/]+)/commit/main", path):
            self._commit(self.server.repositories[match[1]], [json.loads(line) for line in body.splitlines()])
            self._answer({"commitUrl": f"{self.server.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({"error": f"no such page: {path}"}, 404)

    def _commit(self, files: Files, operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                self.server.commits.append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]

    def _refused(self, name: str, revision: str) -> bool:
        if name in self.server.gated:
            self._answer({"error": "Access to it is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
        elif name not in self.server.repositories:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._answer({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _answer(self, document: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Tests have their own output."""


def _oid(content: bytes) -> str:
    """Git's name for a file."""
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()
