"""A stranger's video is decoded in a helper process, within limits: what it does to its decoder harms nothing else.

    packing task: VideoPacker.store()                  the helper: python -m shards.packing.sandbox
        a request, one line of JSON          ──>       store_video(), with a memory limit and a temporary folder
        the reply: JSON, video, flow         <──         └─ ffmpeg, the encoder, in the same process group

The helper stores one video after the other. Where it crashes, wants too much memory or is not done in time, it is killed
with its encoder, the video is refused by name, and the next one gets a new helper. What it sends is neither unpickled nor
taken at its word, as it has read hostile bytes. It ends by itself when the packing task is gone.
"""

import errno
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NoReturn

from shards.packing.flow import NoOpenCV
from shards.packing.transcode import check_segment, store_video, stored_suffix
from shards.video import BadVideo, Limits, Packing, Stored

START_SECONDS = 120.0  # for a new helper, which imports NumPy and PyAV; disks may be slow
LOOK_SECONDS = 0.5  # from one look at whether the packing task is still there to the next
SIZE_BYTES = 8  # of the number before each part of a reply
SECRETS = re.compile(r"^(AWS|GOOGLE|AZURE|RAY|MLFLOW)_|KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
REFUSALS = {"BadVideo": BadVideo, "NoOpenCV": NoOpenCV}  # they reach the caller as they are


class HelperDied(BadVideo):
    """A video that took the helper along: it crashed, or ran out of memory."""


class VideoPacker:
    """Stores videos as store_video does, each within the limits. A `with` block ends its helper; of one thread at a time."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.helper: Helper | None = None

    def store(
        self, path: Path, packing: Packing, start_seconds: float | None = None, end_seconds: float | None = None
    ) -> Stored:
        """What store_video gives back. It raises the same, with BadVideo also for a video that crashes its decoder or goes
        beyond the limits, and RuntimeError with the helper's trace for a fault of ours."""
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
            raise_as(reply)
        return Stored(
            data=video,
            suffix=stored_suffix(path, packing),
            num_frames=int(reply["num_frames"]),
            fps=float(reply["fps"]),
            flow=flow if packing.flow != "none" else None,
        )

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], bytes, bytes]:
        """The helper's reply. A helper of which anything went wrong is not used again."""
        is_new = self.helper is None
        if self.helper is None:
            self.helper = Helper(self.limits)
        try:
            return self.helper.ask(request, seconds)
        except BaseException as error:
            self.close()
            if isinstance(error, HelperDied) and not is_new:  # perhaps of what a video before this one did to it
                return self.ask(request, seconds)
            raise

    def close(self) -> None:
        if self.helper is not None:
            self.helper.kill()
            self.helper = None

    def __enter__(self) -> "VideoPacker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def raise_as(reply: dict[str, Any]) -> NoReturn:
    """Raises the error that a reply tells of."""
    if reply["error"] in REFUSALS:
        raise REFUSALS[reply["error"]](reply["message"])
    if reply["error"] == "OSError":
        raise OSError(*reply["args"])  # becomes PermissionError and the like by its number
    raise RuntimeError(f"storing a video failed in the helper process:\n{reply['error']}")


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process that decodes strangers' files may know: no credentials of stores, clusters or trackers."""
    return {name: value for name, value in environment.items() if not SECRETS.search(name)}


class Helper:
    """The packing task's side of a helper: the process, its temporary folder, and what it says."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.is_ready = False
        self.said = ""
        self.folder = tempfile.TemporaryDirectory(prefix="grurcn-isolated-", ignore_cleanup_errors=True)
        self.words = tempfile.TemporaryFile()  # noqa: SIM115  # closed in kill(); a pipe could fill up
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Libraries that start a thread a core would take gigabytes of address space.
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        # -P: no module is taken from the folder that happens to be the current one.
        command = [
            sys.executable,
            "-P",
            "-m",
            "shards.packing.sandbox",
            str(os.getpid()),
            str(self.memory),
            self.folder.name,
        ]
        self.process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            env={
                **without_secrets(os.environ),
                **one_thread,
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

    @property
    def memory(self) -> int:
        """The memory limit in bytes."""
        return int(self.limits.memory_limit * 2**30)

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], bytes, bytes]:
        """Sends a request and gives back its reply, the video's bytes and the flow's.

        Raises BadVideo if that takes longer than `seconds`, HelperDied, and RuntimeError where the helper does not work at
        all. The helper is of no more use then, nor after a KeyboardInterrupt.
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
                f"not done after {seconds:g} s; cut it into shorter videos, or give it more (--time-limit)"
            ) from None
        except EOFError:
            status = self.kill()
            if status >= 0:
                raise RuntimeError(f"the helper process ended with status {status}:\n{self.said}") from None
            reason = f"signal {-status}: {signal.strsignal(-status)}"
            raise HelperDied(f"the decoder crashed ({reason}); re-encode it or leave it out") from None
        if reply.get("error") == "MemoryError":
            raise HelperDied(
                f"wants more than {self.limits.memory_limit:g} GiB of memory; leave it out, or give it more (--memory-limit)"
            )
        return reply, video, flow

    def wait_for_start(self) -> None:
        try:
            self.read_part(time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError):
            status = self.kill()
            raise RuntimeError(
                f"the helper process that decodes videos did not start ({status}):\n{self.said}"
            ) from None
        self.is_ready = True

    def read_part(self, until: float) -> bytes:
        size = int.from_bytes(self.read(SIZE_BYTES, until))
        if size > self.memory:
            raise RuntimeError(f"the helper process wants to send {size:,} bytes: more than its memory")
        return self.read(size, until)

    def read(self, size: int, until: float) -> bytes:
        """So many bytes. Raises EOFError if there are less, TimeoutError if they are not there in time."""
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
        """Ends it and its encoder, removes what they have written, and gives back the status it had or has now."""
        if not self.words.closed:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            size = self.words.seek(0, os.SEEK_END)
            self.words.seek(max(0, size - 4000))
            self.said = self.words.read().decode(errors="replace").strip()
            for file in (self.requests, self.replies, self.words):
                file.close()
            self.folder.cleanup()
        return self.process.returncode


# The helper's side


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers each request until there are no more."""
    send(replies, b"ready")
    for line in requests:
        send(replies, *answer(json.loads(line)))


def answer(request: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """The three parts of a reply."""
    video, flow = b"", b""
    try:
        path, packing = Path(request.pop("path")), Packing(**request.pop("packing"))
        stored = store_video(path, packing, **request)
        video, flow = stored.data, stored.flow or b""
        reply: dict[str, Any] = {"num_frames": stored.num_frames, "fps": stored.fps}
    except (BadVideo, NoOpenCV) as error:
        reply = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            reply = {"error": "MemoryError"}
        elif isinstance(error, OSError):
            reply = {"error": "OSError", "args": [*error.args[:2], *([str(error.filename)] if error.filename else [])]}
        else:
            reply = {"error": traceback.format_exc()}
    return json.dumps(reply).encode(), video, flow


def is_out_of_memory(error: Exception) -> bool:
    """Python's and PyAV's error, the operating system's, or OpenCV's."""
    return (
        isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM or getattr(error, "code", 0) == -4
    )


def send(replies: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        replies.write(len(part).to_bytes(SIZE_BYTES))
        replies.write(part)
    replies.flush()


def limit_memory(size_bytes: int) -> None:
    """Of this process, and of the encoders that it starts; no file of theirs may be larger, as it is read in the end."""
    for kind, wanted in (
        (resource.RLIMIT_AS, size_bytes),
        (resource.RLIMIT_FSIZE, size_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, allowed = resource.getrlimit(kind)
        limit = wanted if allowed == resource.RLIM_INFINITY else min(wanted, allowed)
        resource.setrlimit(kind, (limit, limit))


def end_after(parent: int, folder: str) -> None:
    """Ends this process soon after its parent has ended, in the middle of a video too."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    leave(folder)


def leave(folder: str) -> NoReturn:
    """Removes the temporary folder and ends, with the encoder: by a signal to the whole group, as threads may hang."""
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    parent, memory, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between
    threading.Thread(target=end_after, args=(parent, folder), daemon=True).start()
    limit_memory(memory)
    serve(sys.stdin.buffer, replies)
    leave(folder)


if __name__ == "__main__":
    main()
