"""Decodes a stranger's video in a process of its own, within limits, where it can harm nothing else.

    packing task: Sandbox.store()                      python -m shards.packing.sandbox_process
        a request, one line of JSON          ──>       store_video(), with a memory limit and a temporary folder
        the reply: JSON, video, flow         <──         └─ ffmpeg, the encoder, in the same process group

The process stores one video after the other. If it crashes, or takes too much memory or time, it is killed together with its
encoder: the video is rejected with the reason, and the next one gets a new process. As it has read hostile bytes, what it
sends is not unpickled, and its sizes are checked. It ends by itself when the packing task is gone.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from shards.packing.flow import NoOpenCV
from shards.packing.sandbox_process import SIZE_BYTES
from shards.packing.transcode import check_segment, stored_suffix
from shards.store.credentials import is_secret
from shards.video import BadVideo, Limits, Packing, Stored

START_SECONDS = 120.0  # for a new process, which imports NumPy and PyAV; disks may be slow
SERVICES = ("AWS_", "GOOGLE_", "AZURE_", "RAY_", "MLFLOW_")  # whose variables no decoder needs
REJECTIONS = {"BadVideo": BadVideo, "NoOpenCV": NoOpenCV}  # they reach the caller as they are


class SandboxDied(BadVideo):
    """A video that took the process along: it crashed, or ran out of memory."""


class Sandbox:
    """Stores videos as store_video does, each within the limits. A `with` block ends its process. For one thread at a time."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.process: SandboxProcess | None = None

    def store(
        self, path: Path, packing: Packing, start_seconds: float | None = None, end_seconds: float | None = None
    ) -> Stored:
        """Returns what store_video does, and raises the same.

        Raises BadVideo also for a video that crashes its decoder or exceeds the limits, and RuntimeError with the process's
        stack trace for a fault of ours.
        """
        check_segment(packing, start_seconds, end_seconds)
        request = {
            "path": str(path.absolute()),
            "packing": asdict(packing),
            "start_seconds": start_seconds,
            "end_seconds": end_seconds,
            "max_pixels": self.limits.max_pixels,
        }
        reply, video, flow = self.ask(request, self.limits.seconds(packing))
        if "error" in reply:
            raise_error_of(reply)
        return Stored(
            data=video,
            suffix=stored_suffix(path, packing),
            num_frames=int(reply["num_frames"]),
            fps=float(reply["fps"]),
            flow=flow if packing.flow != "none" else None,
        )

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], bytes, bytes]:
        """The process's reply. After any error the process is not used again."""
        is_new = self.process is None
        if self.process is None:
            self.process = SandboxProcess(self.limits)
        try:
            return self.process.ask(request, seconds)
        except BaseException as error:
            self.close()
            if isinstance(error, SandboxDied) and not is_new:  # perhaps of what a video before this one did to it
                return self.ask(request, seconds)
            raise

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def raise_error_of(reply: dict[str, Any]) -> NoReturn:
    """Raises the error that a reply describes."""
    if reply["error"] in REJECTIONS:
        raise REJECTIONS[reply["error"]](reply["message"])
    if reply["error"] == "OSError":
        raise OSError(*reply["args"])  # becomes PermissionError and the like by its number
    raise RuntimeError(f"storing a video failed in the sandbox process:\n{reply['error']}")


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without credentials of stores, clusters and trackers."""
    return {name: value for name, value in environment.items() if not (name.startswith(SERVICES) or is_secret(name))}


class SandboxProcess:
    """The packing task's side of a process: its pipes and its temporary folder."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.memory = int(limits.memory_limit * 2**30)  # bytes
        self.is_ready = False
        self.error_output = ""
        self.folder = tempfile.TemporaryDirectory(prefix="grurcn-sandbox-", ignore_cleanup_errors=True)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in kill(); a pipe could fill up
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        arguments = (str(os.getpid()), str(self.memory), self.folder.name)
        self.process = subprocess.Popen(
            # -P: no module is taken from the current folder.
            [sys.executable, "-P", "-m", "shards.packing.sandbox_process", *arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={
                **without_secrets(os.environ),
                # Libraries that start a thread per core would take gigabytes of address space.
                **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
                "PYTHONPATH": os.pathsep.join(paths),
                "TMPDIR": self.folder.name,
            },
            start_new_session=True,  # so that it can be killed with its encoder
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.poll = select.poll()
        self.poll.register(self.replies, select.POLLIN)

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], bytes, bytes]:
        """Sends a request; returns the reply, the video's bytes and the flow's.

        Raises BadVideo if that takes longer than `seconds`, SandboxDied, and RuntimeError if the process does not work at
        all. The process is of no more use then, nor after a KeyboardInterrupt.
        """
        if not self.is_ready:
            self.wait_for_start()
        until = time.monotonic() + seconds
        with suppress(BrokenPipeError):  # it has died since the last video; there will be no reply
            self.requests.write(json.dumps(request).encode() + b"\n")
        try:
            reply = json.loads(self.read_part(until))
            video, flow = self.read_part(until), self.read_part(until)
        except TimeoutError:
            raise BadVideo(
                f"not done after {seconds:g} s; cut it into shorter videos, or raise the limit (--time-limit)"
            ) from None
        except EOFError:
            status = self.kill()
            if status >= 0:
                raise RuntimeError(f"the sandbox process ended with status {status}:\n{self.error_output}") from None
            reason = f"signal {-status}: {signal.strsignal(-status)}"
            raise SandboxDied(f"the decoder crashed ({reason}); re-encode it or leave it out") from None
        if reply.get("error") == "MemoryError":
            limit = self.limits.memory_limit
            raise SandboxDied(
                f"needs more than {limit:g} GiB of memory; leave it out, or raise the limit (--memory-limit)"
            )
        return reply, video, flow

    def wait_for_start(self) -> None:
        try:
            self.read_part(time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError):
            status = self.kill()
            raise RuntimeError(
                f"the sandbox process that decodes videos did not start ({status}):\n{self.error_output}"
            ) from None
        self.is_ready = True

    def read_part(self, until: float) -> bytes:
        size = int.from_bytes(self.read(SIZE_BYTES, until))
        if size > self.memory:
            raise RuntimeError(f"the sandbox process is about to send {size:,} bytes: more than its memory")
        return self.read(size, until)

    def read(self, size: int, until: float) -> bytes:
        """The next `size` bytes. Raises EOFError if there are fewer, TimeoutError if they are not there in time."""
        parts, missing = [], size
        while missing:
            if not self.poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(self.replies.fileno(), min(missing, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def kill(self) -> int:
        """Kills the process and its encoder, deletes what they have written, and returns the exit status."""
        if not self.errors.closed:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            size = self.errors.seek(0, os.SEEK_END)
            self.errors.seek(max(0, size - 4000))
            self.error_output = self.errors.read().decode(errors="replace").strip()
            for file in (self.requests, self.replies, self.errors):
                file.close()
            self.folder.cleanup()
        return self.process.returncode
