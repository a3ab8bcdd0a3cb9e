"""A stand-in for the hub: the part of its HTTP API that fetching uses, on 127.0.0.1."""

import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(.*))?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """One repository: its commits, what its branches name, and who may read it."""

    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    gated: bool = False
    # Sizes that the listing claims instead of the real ones.
    claimed: dict = field(default_factory=dict)

    def commit(self, files, branch="main"):
        """Add a commit; returns its hash."""
        content = [(path, hashlib.sha256(data).hexdigest()) for path, data in files.items()]
        sha = hashlib.sha1(repr([sorted(content), len(self.commits)]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha


class HubStandIn:
    """The server; ``log`` has a (method, path, Range header) for each request.

    ``faults`` maps a file's path to what happens to its next downloads, one entry each: a number of
    bytes after which the connection is closed, or an HTTP status.
    """

    def __init__(self):
        self.repos, self.faults, self.log, self.tokens = {}, {}, [], set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self._up = True

    def model(self, name):
        """A new model repository."""
        return self.repos.setdefault(("models", name), Repo())

    def dataset(self, name):
        """A new dataset repository."""
        return self.repos.setdefault(("datasets", name), Repo())

    def stop(self):
        """Take the server down; its port then refuses connections."""
        if self._up:
            self._up = False
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def downloads(self, path):
        """Range headers of the downloads of a file."""
        return [
            bytes_ for method, url, bytes_ in self.log if method == "GET" and url.endswith(path)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *_):
        """Print nothing: tests read ``log``."""

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        if match := API.fullmatch(path):
            kind, name, what, revision, rest = match.groups()
            found = self._find(kind, name, revision or "main")
            if found is not None:
                self._api(*found, what, rest)
        elif match := RESOLVE.fullmatch(path):
            kind, name, revision, file = match.groups()
            found = self._find("datasets" if kind else "models", name, revision)
            if found is not None:
                self._resolve(*found, file)
        else:
            self._error(404, "", "no such page")

    def _find(self, kind, name, revision):
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            # As the hub does, which does not tell what is private from what is not there.
            return self._error(401, "RepoNotFound", "Repository not found")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo.gated and token not in self.hub.tokens:
            return self._error(403, "GatedRepo", "Access to this repository is restricted")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha

    def _api(self, repo, sha, what, rest):
        entries = [
            {
                "type": "file",
                "path": path,
                "oid": _oid(data),
                "size": repo.claimed.get(path, len(data)),
            }
            for path, data in repo.commits[sha].items()
        ]
        folders = {path.rpartition("/")[0] for path in repo.commits[sha]} - {""}
        entries += [{"type": "directory", "path": path, "oid": "0", "size": 0} for path in folders]
        if what == "tree":
            inside = rest.strip("/")
            if inside:
                entries = [e for e in entries if e["path"].startswith(inside + "/")]
            if "recursive=true" not in self.path.lower():
                entries = [e for e in entries if "/" not in e["path"][len(inside) :].strip("/")]
            self._json(entries)
        else:
            siblings = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
            self._json({"id": "x", "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def _resolve(self, repo, sha, file):
        data = repo.commits[sha].get(file)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        start, cut = 0, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
        if self.command == "GET" and self.hub.faults.get(file):
            fault = self.hub.faults[file].pop(0)
            if fault >= 400 and fault < 600:
                return self._error(fault, "", "out of order")
            cut = start + fault
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            with suppress(OSError):
                self.wfile.write(data[start:cut])
            self.close_connection = self.close_connection or cut < len(data)
        return None

    def _json(self, tree):
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code, text, headers=None):
        self._send(
            status,
            json.dumps({"error": text}).encode(),
            {"X-Error-Code": code, "X-Error-Message": text, **(headers or {})},
        )

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
