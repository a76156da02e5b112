"""A small hub on this machine: the endpoints of the Hugging Face hub that an upload asks, over HTTP."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_good"


class Hub(ThreadingHTTPServer):
    """What it was given: files by repository and path, and every request by method and path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {"me/public": False}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def say(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def known(self) -> bool:
        """Whether the token is right; else 401 was said."""
        good = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not good:
            self.say({"error": "Invalid user token."}, 401)
        return good

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        if not self.known():
            return
        if self.path.startswith("/api/whoami"):
            return self.say({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        name = self.path.removeprefix("/api/models/").split("?")[0]
        if name in self.server.private:
            return self.say({"id": name, "private": self.server.private[name], "siblings": []})
        self.say({"error": "Repository not found"}, 404)

    def do_PUT(self) -> None:
        content = self.body()
        self.server.asked.append(f"PUT {self.path}")
        oid = self.path.rsplit("/", 1)[1]
        good = hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.say({}, 200 if good else 400)

    def do_POST(self) -> None:
        content = self.body()
        self.server.asked.append(f"POST {self.path}")
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if not self.known():
            return
        if self.path == "/api/repos/create":
            return self.create(json.loads(content))
        for end, answer in (("/preupload/main", self.modes), ("/objects/batch", self.batch)):
            if self.path.endswith(end):
                return answer(json.loads(content))
        assert self.path.endswith("/commit/main"), self.path
        self.commit(self.path.split("/")[3] + "/" + self.path.split("/")[4], content)

    def create(self, wish: dict[str, Any]) -> None:
        name = f"{wish.get('organization') or 'me'}/{wish['name']}"
        if name == "me/refused":
            return self.say({"error": "You don't have the rights to create a model"}, 403)
        new = name not in self.server.private
        private = bool(wish.get("private")) or wish.get("visibility") == "private"
        self.server.private.setdefault(name, private)
        url = f"{self.server.address}/{name}"
        self.say({"url": url, "name": name, "id": name}, 200 if new else 409)

    def modes(self, wish: dict[str, Any]) -> None:
        """Small texts are kept by git, all else by LFS."""
        said = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "regular" if file["path"].endswith((".json", ".md", ".txt")) else "lfs"}
            for file in wish["files"]
        ]  # fmt: skip
        self.say({"files": said})

    def batch(self, wish: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}", "header": {}}}}
            for one in wish["objects"]
        ]
        self.say({"transfer": "basic", "objects": objects})

    def commit(self, name: str, content: bytes) -> None:
        files = self.server.repositories.setdefault(name, {})
        for line in content.splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                files[told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            if told["key"] == "lfsFile":
                files[told["value"]["path"]] = self.server.objects[told["value"]["oid"]]
        url = f"{self.server.address}/{name}/commit/{'0' * 40}"
        self.say({"success": True, "commitUrl": url, "commitOid": "0" * 40})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, for as long as the block lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(5)
