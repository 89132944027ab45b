"""``lowbit serve`` as a process of its own on a free port, for bench_serve.py and for the tests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Server:
    """A running server; ``ready`` is what it said when it was."""

    def __init__(self, model, *options, start=300):
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        command = [sys.executable, "-m", "lowbit", "serve", str(model), "--port", "0", "--json", *map(str, options)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.messages, text=True, env=environment, cwd=ROOT
        )
        watchdog = threading.Timer(start, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        if not line:
            said = self.said()
            self.close()
            raise AssertionError(f"the server did not start: {said}")
        self.ready = json.loads(line)
        self.url = self.ready["url"]

    def said(self):
        """Everything on its stderr so far."""
        self.messages.seek(0)
        return self.messages.read()

    @cached_property
    def client(self):
        """An openai client for it, without retries; threads may share it."""
        from openai import OpenAI

        return OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def connect(self, timeout=60):
        """A connection of its own."""
        parts = urlsplit(self.url)
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)

    def ask(self, method, path, body=None, headers=None):
        """One request, without a client library: status, headers and text of the answer.

        ``body`` is bytes, or an object that is sent as JSON; ``path`` stands below ``/v1/`` unless it begins with /.
        """
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})}
        connection = self.connect()
        try:
            connection.request(method, path if path.startswith("/") else f"/v1/{path}", body, headers or {})
            response = connection.getresponse()
            return SimpleNamespace(status=response.status, headers=response.headers, text=response.read().decode())
        finally:
            connection.close()

    def end(self, number=signal.SIGTERM, seconds=30):
        """Send a signal, wait for the end, return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=seconds)

    def close(self):
        """Make sure that nothing is left of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if "client" in vars(self):
            self.client.close()
        self.process.stdout.close()
        self.messages.close()

    def cpu_seconds(self):
        """Processor time it has used."""
        import psutil

        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system
