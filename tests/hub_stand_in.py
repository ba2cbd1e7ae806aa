"""A stand-in of the hub: a cache on disk as huggingface_hub lays it out, and a server with its interface."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_cache(cache: Path, repository: str, folder: Path, commit: str = COMMIT, ref: str = "main") -> Path:
    """Put a folder's files into a hub cache, as blobs with links to them; returns the snapshot."""
    place = cache / f"models--{repository.replace('/', '--')}"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = place / "snapshots" / commit / file.relative_to(folder)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(blob.resolve())
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / ref).write_text(commit)
    return place / "snapshots" / commit


@dataclass
class Hub:
    """What the server has, and what it was asked."""

    folders: dict[str, Path] = field(default_factory=dict)  # org/name -> its files, at COMMIT
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)  # not to be read
    hidden: set[str] = field(default_factory=set)  # private, and ours
    refused: dict[str, int] = field(default_factory=dict)  # org/name -> the status of an upload
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # org/name -> uploaded files
    large: str = ""  # the end of names whose files are kept by git LFS, as those of weights are on the hub
    part: int | None = None  # bytes per request of such a file; None: one request
    full: bool = False  # no such file is taken
    objects: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> content of such a file
    verified: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)


class Handler(BaseHTTPRequestHandler):
    """The requests of `snapshot_download`, `create_repo` and `upload_folder`."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        self.hub.asked.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name in self.hub.private or name not in self.hub.folders:
            self.answer(401, {}, {"X-Error-Code": "RepoNotFound"})
        elif name in self.hub.gated:
            self.answer(403, {}, {"X-Error-Code": "GatedRepo"})
        elif parts[0] == "api" and parts[4:5] == ["tree"]:
            self.answer(200, [self.entry(name, path) for path in self.files(name)])
        elif parts[0] == "api":
            known = len(parts) == 4 or parts[5] in ("main", COMMIT)
            content = {"id": name, "sha": COMMIT, "private": name in self.hub.hidden}
            self.answer(200, content) if known else self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        else:
            file = self.hub.folders[name] / "/".join(parts[4:])
            headers = {"ETag": f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(200, file.read_bytes(), headers)

    def do_POST(self) -> None:
        self.hub.asked.append(f"POST {self.path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        body = self.body()
        name = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            self.hub.created.append(own := json.loads(body))
            self.answer(200, {"url": f"http://{self.headers['Host']}/{own['organization']}/{own['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif name in self.hub.refused:
            self.answer(self.hub.refused[name], {})
        elif self.path.startswith("/lfs/") or self.path.endswith("/info/lfs/objects/batch"):
            self.answer(200, self.large_file(json.loads(body)))
        elif "/preupload/" in self.path:
            paths = [one["path"] for one in json.loads(body)["files"]]
            modes = {
                path: "lfs" if self.hub.large and path.endswith(self.hub.large) else "regular"
                for path in paths
            }
            files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.hub.commits[name] = {one["path"]: base64.b64decode(one["content"]) for one in files}
            large = [line["value"] for line in lines if line["key"] == "lfsFile"]
            self.hub.commits[name] |= {one["path"]: self.hub.objects[one["oid"]] for one in large}
            url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self.answer(404, {})

    def do_PUT(self) -> None:
        """A large file, or a part of it: `/lfs/OID` or `/lfs/OID/NUMBER`."""
        self.hub.asked.append(f"PUT {self.path}")
        content = self.chunked() if "Content-Length" not in self.headers else self.body()
        oid = self.path.split("/")[2]
        if self.hub.full:
            self.answer(507, {})
            return
        self.hub.objects[oid] = self.hub.objects.get(oid, b"") + content
        self.answer(200, {}, {"ETag": hashlib.sha1(content).hexdigest()})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def chunked(self) -> bytes:
        """A body whose length is not known in advance: pieces with their lengths before them."""
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def large_file(self, asked: dict[str, Any]) -> dict[str, Any]:
        """git LFS: where to put each file that is not there; the end of one in parts; its check."""
        if "objects" not in asked:
            assert hashlib.sha256(self.hub.objects[asked["oid"]]).hexdigest() == asked["oid"]
            self.hub.verified += [asked["oid"]] if self.path == "/lfs/verify" else []
            return {}
        return {"transfer": "basic", "objects": [self.place_of(one) for one in asked["objects"]]}

    def place_of(self, one: dict[str, Any]) -> dict[str, Any]:
        """The answer for one file of a batch."""
        if one["oid"] in self.hub.objects:
            return one
        root = f"http://{self.headers['Host']}/lfs"
        upload: dict[str, Any] = {"href": f"{root}/{one['oid']}"}
        if self.hub.part is not None:
            parts = range(1, -(-one["size"] // self.hub.part) + 1)
            urls = {f"{number:05}": f"{root}/{one['oid']}/{number}" for number in parts}
            upload = {"href": f"{root}/end", "header": {"chunk_size": str(self.hub.part), **urls}}
        return {**one, "actions": {"upload": upload, "verify": {"href": f"{root}/verify"}}}

    def files(self, name: str) -> list[str]:
        folder = self.hub.folders[name]
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def entry(self, name: str, path: str) -> dict[str, Any]:
        content = (self.hub.folders[name] / path).read_bytes()
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In this context huggingface_hub asks this server, as with HF_ENDPOINT, and uses this cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    use(monkeypatch, cache, offline=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, cache: Path, offline: bool = True) -> None:
    """What HF_HUB_CACHE and HF_HUB_OFFLINE set when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
