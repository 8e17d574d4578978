"""A server that answers wandb's client as the service does, as far as a run's rows go."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    rows: list[dict]  # of the run
    ends: list[int]  # its exit statuses, one for each time it was open

    def log_message(self, *_):
        pass

    def _answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self):
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def do_PUT(self):
        self._body()
        self._answer({})

    def do_POST(self):
        body = self._body()
        answer = {}
        if self.path.endswith("/graphql"):
            answer = {"data": self._queried(json.loads(body))}
        elif "file_stream" in self.path:
            self._streamed(json.loads(body))
        self._answer(answer)

    def _queried(self, request):
        name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
        variables = request.get("variables") or {}
        project = {"id": "P", "name": "maect_jax", "entity": {"id": "E", "name": "me"}}
        run = {
            "id": "R", "name": variables.get("name"), "displayName": "run",
            "sweepName": None, "project": project, "tags": [], "config": "{}",
            "wandbConfig": '{"t": 1}', "summaryMetrics": "{}", "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]),
            "historyLineCount": len(self.rows), "logLineCount": 0, "eventsLineCount": 0,
        }  # fmt: skip
        known = run if self.rows else None
        address = f"http://127.0.0.1:{self.server.server_port}/file/"
        files = [{"name": x, "uploadUrl": address + x} for x in variables.get("files", ())]
        server = {"cliVersionInfo": {"max_cli_version": "1.0.0"}, "features": []}
        return {
            "RunResumeStatus": {"model": project | {"bucket": known}},
            "UpsertBucket": {"upsertBucket": {"bucket": run, "inserted": not known}},
            "CreateRunFiles": {
                "createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}
            },
            "Viewer": {"viewer": {"id": "U", "entity": "me", "username": "me", "flags": "{}"}},
        }.get(name, {"serverInfo": server})

    def _streamed(self, request):
        history = request.get("files", {}).get("wandb-history.jsonl")
        if history:
            first, lines = history["offset"], history["content"]
            self.rows[first : first + len(lines)] = map(json.loads, lines)
        if request.get("complete"):
            self.ends.append(request["exitcode"])


@contextmanager
def serving():
    """Yields the address, the rows and the exit statuses."""
    handler = type("RunHandler", (Handler,), {"rows": [], "ends": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that goes
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.rows, handler.ends
    finally:
        server.shutdown()
        server.server_close()
