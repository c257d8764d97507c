"""A Hugging Face Hub on this machine, behind `HF_ENDPOINT`: as much of its interface as downloading and uploading a model needs.

    with FakeHub() as hub:
        hub.add("someone/model", folder, gated=True)
        subprocess.run(..., env=os.environ | hub.environment(cache))

Written from the requests that huggingface_hub 1.27 and 2.4 make and the answers that they understand (utils/_http.py: `X-Error-Code`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    files: dict[str, bytes]
    sizes: dict[str, int]
    """What the listing claims, where it is not the content's length: a large file need not be made."""
    gated: bool
    private: bool = False
    parameters: int | None = None


@dataclass
class FakeHub:
    token: str = "hf_theonetokenthatisright"
    """The token that may read gated repositories and write; `token_without_right` is known but may not."""
    token_without_right: str = "hf_knownbutnotaccepted"
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, token sent) of everything that was asked."""
    down: bool = False

    def add(
        self,
        name: str,
        files: Path | dict[str, bytes],
        sizes: dict[str, int] | None = None,
        gated: bool = False,
        **more: Any,
    ) -> None:
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        self.repositories[name] = Repository(files, sizes or {}, gated, **more)

    def environment(self, cache: Path, token: str = "") -> dict[str, str]:
        """What makes a Python process use this Hub, an empty cache, and that token or none."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def downloaded(self) -> list[str]:
        """The files whose content was fetched."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def __enter__(self) -> FakeHub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((method, path, token))
        if self.hub.down:
            return self.refuse(503, "", "down for maintenance")
        if path == "/":
            return self.send(b"hello")
        if token and token not in (self.hub.token, self.hub.token_without_right):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if method == "POST":
            return self.write(path, token, body)
        parts = path.strip("/").split("/")
        parts = parts[parts[0] == "datasets" :]
        if parts[:1] == ["api"]:  # api/models/owner/name or api/datasets/owner/name
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse(401 if not token else 404, "RepoNotFound", "Repository not found")
        if rest[:1] == ["resolve"]:
            return self.file(repository, "/".join(rest[2:]), token)
        listing = [
            {
                "type": "file",
                "path": file,
                "rfilename": file,
                "oid": "0" * 40,
                "size": repository.sizes.get(file, len(content)),
            }
            for file, content in repository.files.items()
        ]
        if rest[:1] == ["tree"]:
            return self.send_json(listing)
        card = {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "private": False,
            "gated": "manual" if repository.gated else False,
            "tags": [],
            "downloads": 0,
            "siblings": listing,
        }
        if repository.parameters:
            card["safetensors"] = {"parameters": {"BF16": repository.parameters}, "total": repository.parameters}
        return self.send_json(card)

    def file(self, repository: Repository, name: str, token: str) -> None:
        if repository.gated and token != self.hub.token:
            return self.refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        if name not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = repository.files[name]
        size = str(repository.sizes.get(name, len(content)))
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send(content, {"ETag": etag, "X-Repo-Commit": COMMIT, "X-Linked-Size": size})

    def write(self, path: str, token: str, body: bytes) -> None:
        if token != self.hub.token:
            return self.refuse(403, "", "Forbidden: this token may not write")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name'].rpartition('/')[2]}"
            self.hub.repositories.setdefault(
                name,
                Repository({}, {}, False, private=bool(asked.get("private") or asked.get("visibility") == "private")),
            )
            return self.send_json({"url": f"{self.hub.address}/{name}", "id": name, "name": name})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.send_json(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        if "/commit/" in path:
            for line in body.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.hub.repositories[name].files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            return self.send_json(
                {"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        return self.send_json({})

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message}, status)

    def send_json(self, content: Any) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
