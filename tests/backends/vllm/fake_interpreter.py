"""An interpreter that seems to have vLLM: whatever it is told to run, it serves what a started server must answer."""

from __future__ import annotations

import sys
from pathlib import Path

SERVER = """
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

given = dict(zip(sys.argv, sys.argv[1:]))
if given["--served-model-name"] == "broken":
    print("loading\\nRuntimeError: no memory left", flush=True)
    sys.exit(3)
asleep = False

class Handler(BaseHTTPRequestHandler):
    def answer(self, text):
        global asleep
        key = os.environ.get("VLLM_API_KEY")
        allowed = self.path == "/health" or not key or self.headers.get("Authorization") == "Bearer " + key
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self):
        self.answer({
            "/is_sleeping": json.dumps({"is_sleeping": asleep}),
            "/metrics": "vllm:num_requests_running 3\\nvllm:num_requests_waiting 2\\nvllm:kv_cache_usage_perc 0.25\\n",
        }.get(self.path, ""))
    def do_POST(self):
        global asleep
        asleep = {"/sleep?level=1": True, "/wake_up": False}.get(self.path, asleep)
        self.answer("{}")
    def log_message(self, *_):
        pass

child = subprocess.Popen(["sleep", "600"])
print("pids", os.getpid(), child.pid, flush=True)
HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


def write_interpreter(folder: Path) -> Path:
    """The interpreter's path."""
    script, python = folder / "server.py", folder / "python"
    script.write_text(SERVER)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    return python


def pids(log: Path) -> list[int]:
    """The processes of a server that logs there, its own and a child; none before it runs."""
    words = log.read_text().split()
    first = words.index("pids") + 1 if "pids" in words else len(words)
    return [int(word) for word in words[first : first + 2]]
