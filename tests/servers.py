"""Servers on loopback: a file server that can misbehave, and a Hugging Face Hub that stores what it is sent."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]

FAULTLESS = {"status": 200, "cut": None, "headers": {}, "body": None, "hang": 0, "redirect": None}


class QuietServer(ThreadingHTTPServer):
    """Clients that are killed, or stop reading, are part of the tests."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """Serves `files` ({path: bytes}) with ranges, and logs `requests` as (method, path, Range).

    `faults` is a list of dicts, one used up by each GET (the last one for ever with `forever`): status, headers, body; `cut`,
    the share of the body after which the connection breaks; `hang`, seconds before anything is sent; `redirect`, a path.
    """

    def __init__(self):
        self.files, self.requests, self.faults, self.forever = {}, [], [], False
        self.ranges = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                server.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *args):
                pass

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request):
        self.requests.append((request.command, request.path, request.headers.get("Range")))
        fault = FAULTLESS
        if request.command == "GET" and self.faults:
            fault = FAULTLESS | (self.faults[0] if self.forever and len(self.faults) == 1 else self.faults.pop(0))
        time.sleep(fault["hang"])
        if fault["redirect"]:
            return self.reply(request, 302, b"", {"Location": fault["redirect"]})
        if fault["status"] != 200:
            return self.reply(request, fault["status"], fault["body"] or b"no", fault["headers"])
        data = fault["body"] if fault["body"] is not None else self.files.get(request.path)
        if data is None:
            return self.reply(request, 404, b"not here", {})
        status, headers = 200, {"Content-Type": "application/octet-stream", **fault["headers"]}
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")) if self.ranges else None
        if wanted:
            start = int(wanted[1])
            if start >= len(data):
                return self.reply(request, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        self.reply(request, status, data, headers, cut=fault["cut"])

    def reply(self, request, status, data, headers, cut=None):
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        try:
            request.wfile.write(data if cut is None else data[: int(len(data) * cut)])
            if cut is not None:
                request.wfile.flush()
                request.connection.shutdown(socket.SHUT_RDWR)
                request.close_connection = True
        except OSError:  # the other side hung up first
            request.close_connection = True


class Hub(Server):
    """The part of a Hub that creating, uploading and reading model repositories needs.

    `repos`: {"owner/name": [{file: bytes}, ...]}, one dict per commit, the last one is main. `down`: answer this status
    to everything; `hang`: only after so many seconds. `deny`: {"owner/name": (status, X-Error-Code)}. `token`: what uploads
    and downloads of `private` repositories must be signed with.
    """

    def __init__(self):
        super().__init__()
        self.token = "hf_loopback"
        self.clear()

    def clear(self):
        self.repos, self.lfs, self.deny, self.private, self.down, self.hang = {}, {}, {}, set(), None, 0
        self.faults, self.forever, self.requests = [], False, []

    @staticmethod
    def commit_of(index):
        return hashlib.sha1(str(index).encode()).hexdigest()

    def add(self, repo_id, **files):
        """Commit files, given as name_ext=bytes."""
        commits = self.repos.setdefault(repo_id, [{}])
        commits.append(commits[-1] | {"model.safetensors" if k == "weights" else "config.json": v for k, v in files.items()})
        return self.commit_of(len(commits) - 1)

    def handle(self, request):
        path = request.path.partition("?")[0]
        time.sleep(self.hang)
        if self.down:
            self.requests.append((request.command, path, None))
            return self.reply(request, self.down, b"down", {})
        if request.command in ("GET", "HEAD") and (match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)):
            return self.resolve(request, *match.groups())
        self.requests.append((request.command, path, None))
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if request.headers.get("Authorization") != f"Bearer {self.token}" and not path.startswith("/lfs/"):
            return self.reply(request, 401, b"{}", {})
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self.reply(request, 400, b"wrong content", {})
            self.lfs[match[1]] = body
            return self.reply(request, 200, b"", {})
        answer = self.api(request.command, path, body)
        self.reply(request, 200 if answer is not None else 404, json.dumps(answer or {}).encode(), {})

    def resolve(self, request, repo_id, revision, name):
        commits = self.repos.get(repo_id)
        known = {self.commit_of(i): i for i in range(len(commits or ()))} | {"main": len(commits or ()) - 1}
        status, code = 200, None
        if repo_id in self.deny:
            status, code = self.deny[repo_id]
        elif commits is None or (repo_id in self.private and request.headers.get("Authorization") != f"Bearer {self.token}"):
            status, code = 401, "RepoNotFound"
        elif revision not in known:
            status, code = 404, "RevisionNotFound"
        elif name not in commits[known[revision]]:
            status, code = 404, "EntryNotFound"
        if status != 200:
            self.requests.append((request.command, request.path, None))
            return self.reply(request, status, b"", {"X-Error-Code": code} if code else {})
        data = commits[known[revision]][name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.commit_of(known[revision])}
        if request.command == "HEAD":
            self.requests.append(("HEAD", request.path, None))
            return self.reply(request, 200, data, headers)
        self.files[request.path] = data
        super().handle(request)

    def api(self, method, path, body):
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.repos.setdefault(repo_id, [{}])
            return {"url": f"{self.url}/{repo_id}", "id": repo_id}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]}
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}", "header": {}}}} for o in objects]
            return {"transfer": "basic", "objects": upload}
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        return None

    def commit(self, repo_id, lines):
        files = dict(self.repos[repo_id][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
        self.repos[repo_id].append(files)
        oid = self.commit_of(len(self.repos[repo_id]) - 1)
        return {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid}


def start_python(script, cwd, **env):
    """Start a fresh process that sees this checkout and the loopback Hub."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | env
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_python(script, cwd, **env):
    """Run it to its end; return (what it printed, what it complained). It must not fail."""
    process = start_python(script, cwd, **env)
    out, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    return out, complaints
