"""python -m shards.packing.sandbox_process: the process in which a stranger's video is decoded; sandbox.py starts it."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

from shards.packing.flow import NoOpenCV
from shards.packing.transcode import store_video
from shards.video import BadVideo, Packing

SECONDS_BETWEEN_LOOKS = 0.5  # at whether the packing task is still there
SIZE_BYTES = 8  # of the number before each part of a reply


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers requests until there are no more."""
    send(replies, b"ready")
    for line in requests:
        send(replies, *answer(json.loads(line)))


def answer(request: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """The three parts of a reply: JSON, the video's bytes and the flow's."""
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
    """Whether it is the error of Python and PyAV, of the operating system, or of OpenCV."""
    return (
        isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM or getattr(error, "code", 0) == -4
    )


def send(replies: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        replies.write(len(part).to_bytes(SIZE_BYTES))
        replies.write(part)
    replies.flush()


def limit_memory(size_bytes: int) -> None:
    """Limits this process, and each encoder that it starts; a file is limited too, as it is read into memory."""
    limits = {resource.RLIMIT_AS: size_bytes, resource.RLIMIT_FSIZE: size_bytes, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        _, allowed = resource.getrlimit(kind)
        limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
        resource.setrlimit(kind, (limit, limit))


def end_with(parent: int, folder: str) -> None:
    """Ends this process soon after its parent has ended, also in the middle of a video."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    leave(folder)


def leave(folder: str) -> NoReturn:
    """Deletes the temporary folder and ends, with the encoder: by a signal to the whole group, as threads may hang."""
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    parent, memory, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between replies
    threading.Thread(target=end_with, args=(parent, folder), daemon=True).start()
    limit_memory(memory)
    serve(sys.stdin.buffer, replies)
    leave(folder)


if __name__ == "__main__":
    main()
