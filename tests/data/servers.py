"""Real servers on loopback: nginx, S3 by moto, and some that misbehave on purpose."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vlm_train.data.remote import close_connections

_NGINX = """
daemon off; master_process off; worker_processes 1; {user}
pid {home}/pid; error_log {home}/error.log;
events {{ worker_connections 512; }}
http {{
    log_format bytes '$request_method $status $body_bytes_sent $request_uri';
    access_log {home}/access.log bytes;
    client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; {extra} }}
}}
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


class Nginx:
    """Serves a folder; every answer's body bytes are in its access log."""

    def __init__(self, root: Path, home: Path, *, extra=""):
        home.mkdir(parents=True, exist_ok=True)
        self.folder, self.home, self.port, self.process = root, home, free_port(), None
        user = "user root;" if os.geteuid() == 0 else ""
        (home / "nginx.conf").write_text(_NGINX.format(home=home, root=root, port=self.port, user=user, extra=extra))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        if program is None:
            pytest.skip("nginx is not installed (Debian: nginx-light)")
        command = [program, "-p", self.home, "-c", self.home / "nginx.conf", "-e", self.home / "error.log"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(self._listens)
        return self

    def kill(self):
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(timeout=10)
            self.process = None

    def _listens(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def log(self):
        """(method, status, body bytes, path) of every request that has been answered."""
        lines = (self.home / "access.log").read_text().splitlines()
        return [(m, int(s), int(b), p) for m, s, b, p in (line.split(" ", 3) for line in lines)]

    def body_bytes(self, at_least=0):
        """Bytes sent; nginx logs a request after its last byte, so the last ones are waited for."""
        wait_for(lambda: sum(row[2] for row in self.log()) >= at_least)
        return sum(row[2] for row in self.log())

    def __enter__(self):
        return self.start()

    def __exit__(self, *exception):
        self.kill()


class S3:
    """An S3 server in this process, and the environment that leads to it. Its objects survive `stop` and `start`."""

    def __init__(self):
        from moto.server import ThreadedMotoServer

        self._kind, self.port, self._server = ThreadedMotoServer, free_port(), None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self._server = self._kind(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        return self

    def stop(self):
        if self._server is not None:
            self._server.stop()
            self._server = None

    def put(self, bucket, files):
        import boto3

        client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=bucket)
        for key, content in files.items():
            client.put_object(Bucket=bucket, Key=key, Body=content)

    def __enter__(self):
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        self._before = dict(os.environ)
        os.environ.update(keys, AWS_ENDPOINT_URL_S3=self.url, no_proxy="127.0.0.1")
        close_connections()
        return self.start()

    def __exit__(self, *exception):
        os.environ.clear()
        os.environ.update(self._before)
        close_connections()
        self.stop()


class Odd:
    """A web server with a mind of its own: `behave(handler, number)` answers a request, or None to serve `content`."""

    def __init__(self, content=b"", behave=lambda handler, number: None):
        self.content, self.behave, self.paths = content, behave, []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with owner._lock:
                    owner.paths.append(self.path)
                    number = len(owner.paths)
                if owner.behave(self, number) is None:
                    serve_range(self, owner.content)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address):
                pass

        self._lock = threading.Lock()
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()


def serve_range(handler, content, *, num_sent=None, etag='"one"'):
    """A proper answer to a range, of which only `num_sent` bytes are sent."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"])
    start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
    handler.send_header("ETag", etag)
    handler.send_header("Content-Length", str(end - start))
    handler.end_headers()
    handler.wfile.write(content[start:end][:num_sent])
    return True


def refuse(handler, status):
    handler.send_response(status)
    handler.send_header("Content-Length", "0")
    handler.end_headers()
    return True


def hang_up(handler):
    """Closes the connection in the middle of nothing."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def stall(handler, seconds=30.0):
    """Takes the request and says nothing."""
    time.sleep(seconds)
    return hang_up(handler)
