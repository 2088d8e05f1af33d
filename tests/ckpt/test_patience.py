"""A Hub that hangs, lies or never ends, as a server on the loopback."""

import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import ROOT

FETCH = """
import sys
from ckpt import hub, patience
from harness.cli import cli
patience.ANSWER, patience.PART, patience.MEMORY = 3, 3, 2**28
open_data = sys.argv[1] == "data"
if open_data:
    from data.sources import fetch_dataset
cli(lambda: print((fetch_dataset if open_data else hub.resolve)(sys.argv[2])))
"""
COMMIT = "0" * 40
HTML = b"<!doctype html><title>please log in</title>"


class Hub(http.server.BaseHTTPRequestHandler):
    mode = ""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def endless(self, block=b"x" * 2**20):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))

    def do_HEAD(self):
        if self.mode in ("hang", "html", "500"):
            self.do_GET()
        elif self.mode == "later":
            self.reply(429, Retry_After=10**6)
        else:
            self.reply(200, ETag='"abc"', X_Repo_Commit=COMMIT, Content_Length=100)

    def do_GET(self):
        listing = self.path.startswith("/api/")
        if self.mode == "hang":
            time.sleep(60)
        elif self.mode == "html":
            self.reply(200, HTML, Content_Type="text/html")
        elif self.mode == "500":
            self.reply(500, HTML)
        elif self.mode == "later":
            self.reply(429, Retry_After=10**6)
        elif self.mode == "good":
            self.reply(200, b"x" * 100)
        elif self.mode == "endless":
            self.endless()
        else:  # a byte now and then
            self.reply(200, b"[", Content_Length=10**6 if listing else 100)
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(1)


@pytest.fixture
def ask(tmp_path):
    """ask(mode, kind, spec) -> (exit code, lines of stdout, of stderr, seconds)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(mode, kind, spec):
        Hub.mode = mode
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        start = time.perf_counter()
        command = [sys.executable, "-c", FETCH, kind, spec]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=90
        )
        out, err = done.stdout.splitlines(), done.stderr.splitlines()
        return done.returncode, out, err, time.perf_counter() - start

    yield run
    server.shutdown()
    server.server_close()


NAMED, LISTED = ("file", "hf:o/n/m.safetensors"), ("file", "hf:o/n")
DATA = ("data", "hf:o/n")


@pytest.mark.parametrize(
    "mode, kind, spec",
    [
        *[(mode, *NAMED) for mode in ("hang", "html", "500", "later", "endless", "slow")],
        *[(mode, *LISTED) for mode in ("html", "endless")],
        *[(mode, *DATA) for mode in ("later", "endless")],
    ],
)
def test_a_hub_that_misbehaves_is_one_line_within_the_stated_time(ask, mode, kind, spec):
    code, out, err, seconds = ask(mode, kind, spec)
    assert code == 2 and len(err) == 1 and err[0].startswith(f"error: {spec}"), err
    assert seconds < 60


def test_a_hub_that_behaves_is_read(ask):
    code, out, err, _ = ask("good", *NAMED)
    assert code == 0 and not err and Path(out[-1]).read_bytes() == b"x" * 100, err
