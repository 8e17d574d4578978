"""A server that speaks the protocol of HuggingFace's hub, as far as its client asks for it."""

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
_LARGE = (".safetensors", ".bin", ".pth")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<kind>\w+)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CDN = re.compile(r"/cdn/(?P<sha>\w+)/(?P<file>.+)")


class Hub:
    """Repositories by id, whose commits hold files by name.

    Attributes:
      url: of the server, for HF_ENDPOINT.
      sent: the names of the files that were downloaded.
      asked: how many requests there were.
      gated: ids that only the token opens; of `private` ones nobody else hears.
      cut: how many downloads of large files end in the middle.
      pause: seconds before each of these.
    """

    def __init__(self, port: int):
        self.url, self.cdn = f"http://localhost:{port}", f"http://127.0.0.1:{port}/cdn"
        self.sent: list[str] = []
        self.asked = self.cut = 0
        self.pause = 0.0
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self._branches: dict[tuple[str, str], str] = {}

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Makes a commit that holds these files alone; returns its hash."""
        own = self._commits.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(own)}".encode()).hexdigest()
        own[commit], self._branches[repo, branch] = dict(files), commit
        return commit

    def find(self, repo: str, revision: str, known: bool):
        """A commit and its files; or the status and the code of an error."""
        if repo not in self._commits or (repo in self.private and not known):
            return HTTPStatus.UNAUTHORIZED, "RepoNotFound"
        commit = self._branches.get((repo, revision), revision)
        if commit not in self._commits[repo]:
            return HTTPStatus.NOT_FOUND, "RevisionNotFound"
        return commit, self._commits[repo][commit]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.asked += 1
        if match := _CDN.fullmatch(path):
            self.hub.sent += [match["file"]] * (self.command == "GET")
            time.sleep(self.hub.pause)
            self._content(self.hub.large[match["sha"]], match["sha"])
        elif match := _API.fullmatch(path):
            self._about(match["repo"], match["kind"], unquote(match["revision"] or "main"))
        elif match := _FILE.fullmatch(path):
            self._resolve(match["repo"], unquote(match["revision"]), unquote(match["file"]))
        else:
            self._answer(HTTPStatus.NOT_FOUND)

    def do_HEAD(self):
        self.do_GET()

    def _find(self, repo, revision):
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        commit, files = self.hub.find(repo, revision, known)
        if isinstance(commit, HTTPStatus):
            self._answer(commit, {"X-Error-Code": files})
            return None, {}, known
        return commit, files, known

    def _about(self, repo, kind, revision):
        commit, files, _ = self._find(repo, revision)
        if commit is None:
            return
        about = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        if kind == "tree":
            about = [
                {"type": "file", "path": name, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for name, x in files.items()
            ]
        self._answer(
            HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(about).encode()
        )

    def _resolve(self, repo, revision, name):
        commit, files, known = self._find(repo, revision)
        if commit is None:
            return
        if repo in self.hub.gated and not known:
            self._answer(HTTPStatus.FORBIDDEN, {"X-Error-Code": "GatedRepo"})
            return
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            self._answer(HTTPStatus.NOT_FOUND, headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = files[name]
        sha = hashlib.sha256(content).hexdigest()
        if not name.endswith(_LARGE):
            self.hub.sent += [name] * (self.command == "GET")
            self._content(content, sha, headers)
            return
        self.hub.large[sha] = content  # large files are on another host
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        headers["Location"] = f"{self.hub.cdn}/{sha}/{name}"
        self._answer(HTTPStatus.FOUND, headers)

    def _content(self, content, etag, headers=None):
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"} | (headers or {})
        status, wanted = HTTPStatus.OK, self.headers.get("Range")
        if wanted:
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            size = len(content)
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            status, content = HTTPStatus.PARTIAL_CONTENT, content[first:]
        self._answer(status, headers, content)

    def _answer(self, status, headers=None, content=b""):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut and _CDN.fullmatch(self.path):
            self.hub.cut -= 1
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)


@contextmanager
def serving():
    """A hub that answers within the block."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        handler.hub = Hub(server.server_port)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield handler.hub
        finally:
            server.shutdown()
