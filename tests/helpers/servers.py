"""Real servers for the tests: S3 and Google Cloud Storage as their emulators speak them, and HTTP with ranges and faults."""

import logging
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
    "false"  # of newer kinds of buckets, which the emulator knows nothing of
)
for name in ("werkzeug", "gcp_storage_emulator"):
    logging.getLogger(name).setLevel(logging.ERROR)

BUCKET = "videos"
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "never/to+be/seen+anywhere",
    "AWS_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server with one empty bucket; the environment names it, as a user's would. Gives s3://BUCKET."""
    S3FileSystem.clear_instance_cache()  # which remembers the servers of before
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # servers of one process share what they hold
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    server.stop()
    S3FileSystem.clear_instance_cache()


@contextmanager
def gs_server() -> Iterator[str]:
    """Google's emulator with one empty bucket. Gives gs://BUCKET."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    assert server._api._httpd is not None
    port = server._api._httpd.server_address[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield f"gs://{BUCKET}"
    server.stop()


Fault = Callable[["RangeHandler"], bool]  # answers the request itself, if it gives True


class RangeHandler(SimpleHTTPRequestHandler):
    """Files of a folder, whole or a range of them; before each answer the server's fault may step in."""

    protocol_version = "HTTP/1.1"
    server: "RangeServer"  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:  # http.server's name
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Range")))
        if self.server.delay_seconds:
            time.sleep(self.server.delay_seconds)
        if self.server.fault is not None and self.server.fault(self):
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        start, end = (int(span[1]), min(int(span[2]) + 1, len(content))) if span else (0, len(content))
        if span and start >= len(content):
            self.send_error(416)
            return
        self.answer(
            206 if span else 200, content[start:end], f"bytes {start}-{end - 1}/{len(content)}" if span else None
        )

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()

    def answer(self, status: int, content: bytes, content_range: str | None = None) -> None:
        self.send_response(status)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


class RangeServer(ThreadingHTTPServer):
    """A web server of a folder on a free port of the loopback, until its `with` block ends."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, delay_seconds: float = 0.0, fault: Fault | None = None):
        super().__init__(("127.0.0.1", 0), partial(RangeHandler, directory=str(folder)))  # pyright: ignore[reportArgumentType]
        self.delay_seconds, self.fault = delay_seconds, fault
        self.requests: list[tuple[str, str | None]] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


def first(times: int, do: Callable[[RangeHandler], None], path: str = "") -> Fault:
    """Steps in at the first so many requests for paths that hold `path`."""
    left = [times]

    def fault(handler: RangeHandler) -> bool:
        with handler.server.lock:
            if path not in handler.path or not left[0]:
                return False
            left[0] -= 1
        do(handler)
        return True

    return fault


def status(code: int) -> Callable[[RangeHandler], None]:
    return lambda handler: handler.answer(code, b"no")


def hang_up(handler: RangeHandler) -> None:
    """The connection breaks off within the answer."""
    handler.send_response(206)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.wfile.write(b"a few bytes")
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.close()


def answer_short(handler: RangeHandler) -> None:
    """Fewer bytes than asked for, as some proxies do, and no word of it."""
    handler.answer(206, b"a few bytes")


def ignore_range(handler: RangeHandler) -> None:
    handler.answer(200, Path(handler.translate_path(handler.path)).read_bytes())


FORWARDED = ("AWS_ENDPOINT_URL", *KEYS)


def environment() -> dict[str, str]:
    """What a process that reads from the S3 server must be given."""
    return {name: os.environ[name] for name in FORWARDED}
