"""Servers on loopback: a file server that can misbehave, and a Hugging Face Hub that stores uploads."""

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


class QuietServer(ThreadingHTTPServer):
    """Ignores clients that are killed or stop reading, which are part of the tests."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """Serves `files` ({path: bytes}), with ranges, and logs `requests` as (method, path).

    `faults` is a list of dicts, one used up by each GET (the last one forever with `forever`): `status` instead of 200; `body`
    instead of the file; `cut`, the share of the body after which the connection breaks; `hang`, seconds of silence before the
    response, or with `cut` before the break; `headers`, added or replaced; `raw`, a function that is called with `write`, in
    place of any response. `headers` of the server are those of all responses; `ranges` are the ranges that were asked for.
    """

    def __init__(self):
        self.files, self.requests, self.faults, self.forever = {}, [], [], False
        self.headers, self.ranges = {}, []
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
        self.requests.append((request.command, request.path))
        self.send(request, self.files.get(request.path))

    def send(self, request, data, headers=None):
        """Respond with `data` (None: 404), or with the next fault."""
        headers, fault = dict(headers or {}), {}
        if request.command == "GET" and self.faults:
            fault = self.faults[0] if self.forever and len(self.faults) == 1 else self.faults.pop(0)
        if "raw" in fault:
            return self.send_raw(request, fault["raw"])
        data, cut, hang = fault.get("body", data), fault.get("cut"), fault.get("hang")
        headers |= fault.get("headers", {})
        if hang and cut is None:
            time.sleep(hang)
        if "status" in fault or data is None:
            return self.reply(request, fault.get("status", 404), b"no", fault.get("headers", {}))
        status = 200
        if request.command == "GET":
            self.ranges.append(request.headers.get("Range"))
        if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
            start = int(match[1])
            status, data, total = 206, data[start:], len(data)
            headers = {"Content-Range": f"bytes {start}-{total - 1}/{total}"} | headers
        self.reply(request, status, data, headers, cut, hang)

    def reply(self, request, status, data, headers, cut=None, hang=None):
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers | self.headers).items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        try:
            request.wfile.write(data if cut is None else data[: int(len(data) * cut)])
            if cut is not None:
                request.wfile.flush()
                if hang:
                    time.sleep(hang)
                request.connection.shutdown(socket.SHUT_RDWR)
                request.close_connection = True
        except OSError:  # the client closed the connection first
            request.close_connection = True

    def send_raw(self, request, raw):
        """Let `raw(write)` send what it wants until it returns, or the client leaves."""
        request.close_connection = True
        try:
            raw(request.connection.sendall)
        except OSError:
            return


def trickle(*parts, every=0.01):
    """For `raw`: send the parts, then a byte from time to time, for half a minute."""

    def raw(write):
        write(b"".join(parts))
        for _ in range(int(30 / every)):
            write(b"x")
            time.sleep(every)

    return raw


def flood(head, chunk, most=64 << 20):
    """For `raw`: send a head, and a chunk again and again."""

    def raw(write):
        write(head)
        for _ in range(most // len(chunk)):
            write(chunk)

    return raw


class Hub(Server):
    """The parts of the Hub that creating, uploading, and downloading model repositories need.

    Attributes:
        repos: {"owner/name": [{file: bytes}, ...]}, one dict per commit; the last one is main.
        branches: {"name": index of the commit}, of every repository.
        down: respond to everything with this status; or statuses for the next requests, one each.
        hang: seconds before each response.
        deny: {"owner/name": (status, X-Error-Code)}.
        private: repositories that only requests with `token` may read. Uploads always need it.
        raw_head: in place of all responses to HEAD, see `Server`.
        before_reply: called with the number of requests so far, when a response is ready but not yet sent.
    """

    def __init__(self):
        super().__init__()
        self.token = "hf_loopback"
        self.clear()

    def clear(self):
        self.repos, self.branches, self.deny, self.private, self.down, self.hang = {}, {}, {}, set(), None, 0
        self.faults, self.forever, self.requests, self.before_reply = [], False, [], lambda count: None
        self.headers, self.raw_head = {}, None

    @staticmethod
    def commit_of(index):
        return hashlib.sha1(str(index).encode()).hexdigest()

    def add(self, repo_id, **files):
        """Commit files, given as weights=BYTES and config=BYTES; return the hash of the commit."""
        names = {"weights": "model.safetensors", "config": "config.json"}
        commits = self.repos.setdefault(repo_id, [{}])
        commits.append(commits[-1] | {names[key]: data for key, data in files.items()})
        return self.commit_of(len(commits) - 1)

    def handle(self, request):
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path))
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        time.sleep(self.hang)
        if self.raw_head and request.command == "HEAD":
            return self.send_raw(request, self.raw_head)
        status = self.down.pop(0) if isinstance(self.down, list) and self.down else self.down
        if status:
            return self.reply(request, status, b"down", {})
        signed = request.headers.get("Authorization") == f"Bearer {self.token}"
        if request.command in ("GET", "HEAD") and (match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)):
            return self.resolve(request, signed, *match.groups())
        if not signed:
            return self.reply(request, 401, b"{}", {})
        answer = self.api(request.command, path, body)
        self.reply(request, 200 if answer is not None else 404, json.dumps(answer or {}).encode(), {})

    def resolve(self, request, signed, repo_id, revision, name):
        commits = self.repos.get(repo_id)
        known = {self.commit_of(i): i for i in range(len(commits or ()))} | self.branches | {"main": len(commits or ()) - 1}
        denial = None
        if repo_id in self.deny:
            denial = self.deny[repo_id]
        elif commits is None or (repo_id in self.private and not signed):
            denial = 401, "RepoNotFound"
        elif revision not in known:
            denial = 404, "RevisionNotFound"
        elif name not in commits[known[revision]]:
            denial = 404, "EntryNotFound"
        if denial:
            return self.reply(request, denial[0], b"", {"X-Error-Code": denial[1]} if denial[1] else {})
        data = commits[known[revision]][name]
        self.before_reply(len(self.requests))
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.commit_of(known[revision])}
        self.send(request, data, headers)

    def api(self, method, path, body):
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.repos.setdefault(repo_id, [{}])
            return {"url": f"{self.url}/{repo_id}", "id": repo_id}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        return None

    def commit(self, repo_id, lines):
        files = dict(self.repos[repo_id][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        self.repos[repo_id].append(files)
        oid = self.commit_of(len(self.repos[repo_id]) - 1)
        return {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid}


def start_python(script, cwd, **env):
    """Start a new process with this checkout and the loopback Hub."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | env
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_python(script, cwd, **env):
    """Run a script to its end; return its output (stdout, stderr). It must not fail."""
    process = start_python(script, cwd, **env)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out, errors
