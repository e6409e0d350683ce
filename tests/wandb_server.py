"""A small W&B server: takes what clients send, so that tests see who talks, and what comes of a run."""

import json
import re
import threading
import time
from base64 import b64encode
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer(ThreadingHTTPServer):
    """Knows ``runs``: rows of the history by run id, at the offsets that were sent."""

    daemon_threads = True

    def __init__(self, key):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.url = key, f"http://127.0.0.1:{self.server_port}"
        self.authorization = "Basic " + b64encode(f"api:{key}".encode()).decode()
        self.runs = defaultdict(dict)  # run id -> offset -> row
        self.configs = defaultdict(dict)
        self.artifacts = {}  # name -> metadata and files
        self.asked = []  # names of the queries
        self.hung = threading.Event()

    def handle_error(self, request, client_address):
        """Clients hang up when they are killed."""

    def hang(self):
        """Answer nobody any more."""
        self.hung.set()

    def history(self, run):
        return [row for _, row in sorted(self.runs[run].items())]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *args):
        pass

    def reply(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        if self.server.hung.is_set():
            time.sleep(1000)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
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
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.reply({})

    def viewer(self, variables):
        return {"viewer": {"id": "u", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}

    def server_features_query(self, variables):
        return {"serverInfo": {"features": []}}

    def run_resume_status(self, variables):
        name, rows = variables["name"], self.server.history(variables["name"])
        tail = {"summaryMetrics": "{}", "logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0}
        tail |= {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]", "tags": []}
        bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "wandbConfig": '{"t": 1}', **tail}
        project = {"id": "p", "name": "condenser", "entity": {"id": "e", "name": "us"}}
        return {"model": {**project, "bucket": bucket if rows else None}}

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


@contextmanager
def wandb_server(key="k" * 40):
    server = WandbServer(key)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
