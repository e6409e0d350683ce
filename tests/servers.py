"""Servers of this machine that take what clients send, and remember it: of W&B, and a Hugging Face hub."""

import base64
import json
import re
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients hang up when they are killed."""


@contextmanager
def serving(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# --- W&B


class WandbServer(Server):
    """Knows ``runs``: rows of the history by run id, at the offsets that were sent."""

    def __init__(self, key):
        super().__init__(WandbHandler)
        self.authorization = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
        self.runs = defaultdict(dict)  # run id -> offset -> row
        self.configs = defaultdict(dict)
        self.artifacts = {}  # name -> metadata and files
        self.asked = []  # names of the queries
        self.hung = threading.Event()

    def hang(self):
        """Answer nobody any more."""
        self.hung.set()

    def history(self, run):
        return [row for _, row in sorted(self.runs[run].items())]


class WandbHandler(Handler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self):
        if self.server.hung.is_set():
            time.sleep(1000)
        body = self.body()
        if self.path == "/graphql" and self.headers["Authorization"] != self.server.authorization:
            self.reply({"errors": [{"message": "user is not logged in"}]}, 401)
            return
        if self.path == "/graphql":
            request = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
            self.server.asked.append(name)
            answer = getattr(self, re.sub("(?<!^)(?=[A-Z])", "_", name).lower(), lambda variables: {})
            self.reply({"data": answer(request.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            rows = enumerate(map(json.loads, history["content"]), history["offset"])
            self.server.runs[run].update(rows)
        self.reply({"limits": {}})

    def do_PUT(self):
        self.body()
        self.reply({})

    def viewer(self, variables):
        return {"viewer": {"id": "u", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}

    def server_features_query(self, variables):
        return {"serverInfo": {"features": []}}

    def run_resume_status(self, variables):
        name, rows = variables["name"], self.server.history(variables["name"])
        summary = {key: value for row in rows for key, value in row.items()}
        tail = {
            "summaryMetrics": json.dumps(summary),
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
        }
        tail |= {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]", "tags": []}
        bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "wandbConfig": '{"t": 1}', **tail}
        project = {"id": "p", "name": "condenser", "entity": {"id": "e", "name": "us"}}
        return {"model": {**project, "bucket": bucket if name in self.server.configs else None}}

    def upsert_bucket(self, variables):
        name, project, config = (variables[key] for key in ("name", "project", "config"))
        self.server.configs[name] |= json.loads(config or "{}")
        within = {"id": "p", "name": project, "entity": {"id": "e", "name": "us"}}
        bucket = {"id": name, "name": name, "displayName": name, "description": None, "config": config}
        bucket |= {"sweepName": None, "historyLineCount": len(self.server.runs[name]), "project": within}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def create_run_files(self, variables):
        places = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": places}}

    def artifact_type(self, variables):
        return {"project": {"artifact": None}}

    def create_artifact(self, variables):
        about, name = variables["input"], variables["input"]["artifactCollectionName"]
        self.server.artifacts[name] = {"metadata": json.loads(about["metadata"] or "{}")}
        sequence = {"id": "s", "latestArtifact": None}
        artifact = {"id": name, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def create_artifact_files(self, variables):
        edges = []
        for file in variables["input"]["artifactFiles"]:
            self.server.artifacts[file["artifactID"]].setdefault("files", []).append(file["name"])
            edges.append(
                {"node": {"artifact": {"id": file["artifactID"]}, "storagePath": file["name"], **self.place()}}
            )
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def create_artifact_manifest(self, variables):
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": {"id": "f", **self.place()}}}}

    def update_artifact_manifest(self, variables):
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": {"id": "f", **self.place()}}}}

    def commit_artifact(self, variables):
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}

    def place(self):
        return {"uploadUrl": f"{self.server.url}/upload", "uploadHeaders": [], "uploadMultipartUrls": None}


# --- the hub


class Hub(Server):
    """``files[branch][path]`` are the bytes that were committed."""

    def __init__(self):
        super().__init__(HubHandler)
        self.files: dict[str, dict[str, bytes]] = {"main": {}}
        self.refuses = ""  # a path that is answered with 403


class HubHandler(Handler):
    server: Hub

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        if "/revision/" in self.path or self.path.count("/") == 4:
            return self.reply({"id": "me/model", "sha": "0" * 40, "siblings": []})
        if "/tree/" in self.path:
            files = self.server.files[self.path.split("?")[0].split("/")[-1]]
            return self.reply([{"type": "file", "path": path, "oid": "2" * 40, "size": 1} for path in files])
        return self.reply({"name": "me", "type": "user", "orgs": []})

    def do_POST(self):
        hub, parts = self.server, unquote(self.path.split("?")[0]).split("/")
        body = self.body()
        if hub.refuses and hub.refuses in self.path:
            return self.reply({"error": "You may not write here"}, 403)
        if parts[-2:] == ["repos", "create"]:
            return self.reply({"url": f"{hub.url}/me/{json.loads(body)['name']}"})
        if "branch" in parts:
            hub.files[parts[-1]] = dict(hub.files["main"])  # where a branch begins
            return self.reply({})
        if "preupload" in parts:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.reply({"files": [file | {"shouldIgnore": False} for file in files]})
        if parts[-1] == "validate-yaml":  # of the model card
            return self.reply({"errors": [], "warnings": []})
        assert "commit" in parts
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                hub.files[parts[-1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            if entry["key"] == "deletedFile":
                del hub.files[parts[-1]][entry["value"]["path"]]
        return self.reply({"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/me/model/commit/1"})
