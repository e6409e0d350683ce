"""A Hugging Face hub of this machine: takes repositories, branches and commits of small files, and remembers them."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote


class Hub(ThreadingHTTPServer):
    """``files[branch][path]`` are the bytes that were committed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {"main": {}}
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.refuses = ""  # a path that is answered with 403


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        if "/revision/" in self.path or self.path.count("/") == 4:
            return self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})
        if "/tree/" in self.path:
            files = self.server.files[self.path.split("?")[0].split("/")[-1]]
            return self.answer([{"type": "file", "path": path, "oid": "2" * 40, "size": 1} for path in files])
        return self.answer({"name": "me", "type": "user", "orgs": []})

    def do_POST(self):
        hub, parts = self.server, unquote(self.path.split("?")[0]).split("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hub.refuses and hub.refuses in self.path:
            return self.answer({"error": "You may not write here"}, 403)
        if parts[-2:] == ["repos", "create"]:
            return self.answer({"url": f"{hub.address}/me/{json.loads(body)['name']}"})
        if "branch" in parts:
            hub.files[parts[-1]] = dict(hub.files["main"])  # where a branch begins
            return self.answer({})
        if "preupload" in parts:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if parts[-1] == "validate-yaml":  # of the model card
            return self.answer({"errors": [], "warnings": []})
        assert "commit" in parts
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                hub.files[parts[-1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            if entry["key"] == "deletedFile":
                del hub.files[parts[-1]][entry["value"]["path"]]
        return self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.address}/me/model/commit/1"})


@contextmanager
def hub_of_this_machine() -> Iterator[Hub]:
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
