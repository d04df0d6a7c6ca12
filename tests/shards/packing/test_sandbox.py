"""The sandbox: what comes back, and what a decoder that crashes, hangs or eats memory does to the packing."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from videos import TINY, lavfi_video, numbered_planes, write_video

from shards.packing import sandbox_process
from shards.packing.sandbox import Sandbox, raise_error_of
from shards.packing.sandbox_process import answer
from shards.packing.transcode import store_video
from shards.video import BadVideo, Limits, Packing

COPY = Packing(width=32, height=32, copy=True)


SLOW = Packing(width=1920, height=1080, preset="placebo")  # about a second a frame


SECONDS = 60  # long enough for anything that ends at all


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(time_limit=SECONDS)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "video.avi", numbered_planes(40))


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


def process_of(sandbox: Sandbox) -> psutil.Process:
    assert sandbox.process is not None
    return psutil.Process(sandbox.process.process.pid)


@contextmanager
def in_the_middle(sandbox: Sandbox, action: Callable[[psutil.Process], object]) -> Iterator[list[psutil.Process]]:
    """Does something to the helper as soon as it encodes. Gives back the helper and its encoder, and waits for their end."""
    seen: list[psutil.Process] = []

    def encodes() -> bool:
        """A helper's first child asks ffmpeg for its version and is soon gone; it is not the encoder."""
        if sandbox.process is not None:
            with suppress(psutil.NoSuchProcess):
                helper = process_of(sandbox)
                seen[:] = [helper, *(child for child in helper.children() if "libx264" in child.cmdline())]
        return len(seen) == 2

    def watch() -> None:
        wait_until(encodes)
        action(seen[0])

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    thread.join()
    assert len(seen) == 2
    wait_until(lambda: not any(map(is_alive, seen)))


# What comes back


@pytest.mark.parametrize(
    ("packing", "segment"),
    [(TINY, ()), (COPY, ()), (replace(TINY, flow="dis"), ()), (TINY, (0.4, 1.2))],
    ids=["plain", "copy", "flow", "segment"],
)
def test_a_video_is_stored_as_it_is_without_a_helper(packing, segment, video, sandbox):
    if packing.flow != "none":
        pytest.importorskip("cv2")
    assert sandbox.store(video, packing, *segment) == store_video(video, packing, *segment)


def test_one_helper_stores_many_videos_and_refuses_some(video, tmp_path, sandbox):
    (tmp_path / "notes.avi").write_text("not a video")
    first = sandbox.store(video, TINY)
    helper = process_of(sandbox)
    with pytest.raises(BadVideo) as theirs:
        sandbox.store(tmp_path / "notes.avi", TINY)
    with pytest.raises(BadVideo) as ours:
        store_video(tmp_path / "notes.avi", TINY)
    assert str(theirs.value) == str(ours.value)
    assert sandbox.store(video, TINY) == first
    assert process_of(sandbox) == helper


def test_a_file_name_of_any_bytes_and_from_here_is_found(video, tmp_path, monkeypatch, sandbox):
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(b'caf\xe9 "\n\\.avi'))
    shutil.copy(video, path)
    assert sandbox.store(path, TINY).num_frames == 40


def test_a_missing_file_is_an_error_of_the_file(tmp_path, sandbox):
    with pytest.raises(FileNotFoundError) as caught:
        sandbox.store(tmp_path / "none.avi", TINY)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "none.avi"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), OSError, r"No space left on device: '/tmp/x'"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), PermissionError, "Permission denied: 'x'"),
        (OSError("ffmpeg ended with status 1"), OSError, "^ffmpeg ended with status 1$"),
        (BadVideo("the file is empty"), BadVideo, "^the file is empty$"),
        (KeyError("fps"), RuntimeError, r"(?s)in the sandbox process:.*test_sandbox.py.*KeyError: 'fps'"),
    ],
)
def test_an_error_reaches_the_caller_as_what_it_is(error, kind, message, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sandbox_process, "store_video", fail)
    reply, video, flow = answer({"path": "x", "packing": {}})
    assert (video, flow) == (b"", b"")
    with pytest.raises(kind, match=message) as caught:
        raise_error_of(json.loads(reply))
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


def test_a_request_that_the_helper_does_not_understand_is_a_fault_of_ours(video, sandbox):
    sandbox.store(video, TINY)
    reply, *_ = sandbox.ask({"nonsense": 1}, SECONDS)
    with pytest.raises(RuntimeError, match="KeyError: 'path'"):
        raise_error_of(reply)


def test_a_helper_that_does_not_start_is_a_fault_of_ours(video, sandbox, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match=r"did not start .1."):
        sandbox.store(video, TINY)


def test_a_helper_is_told_no_credentials(video, sandbox, monkeypatch):
    secrets = (
        "AWS_SECRET_ACCESS_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "MLFLOW_TRACKING_PASSWORD",
        "HF_TOKEN",
        "RAY_AUTH_MODE",
    )
    for name in (*secrets, "COLUMNS"):
        monkeypatch.setenv(name, "here")
    sandbox.store(video, TINY)
    names = psutil.Process(sandbox.process.process.pid).environ()
    assert "COLUMNS" in names
    assert not set(secrets) & set(names)


def test_a_helper_starts_without_the_libraries_of_training():
    """So that it starts in a fraction of a second."""
    script = (
        "import sys, shards.packing.sandbox; print({'torch', 'ray', 'pyarrow', 'webdataset', 'cv2'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[3], capture_output=True, check=True
    )
    assert said.stdout == b"set()\n"


# Decoders that crash, hang or eat memory


def test_a_video_that_crashes_its_decoder_is_refused_and_the_next_one_is_stored(video, sandbox):
    with (
        in_the_middle(sandbox, lambda helper: helper.send_signal(signal.SIGSEGV)),
        pytest.raises(BadVideo, match=r"the decoder crashed .signal 11: Segmentation fault."),
    ):
        sandbox.store(video, SLOW)
    assert sandbox.store(video, TINY).num_frames == 40


def test_a_helper_that_died_of_another_video_is_replaced(video, sandbox):
    first = sandbox.store(video, TINY)
    process_of(sandbox).kill()
    assert sandbox.store(video, TINY) == first


def test_a_video_that_takes_for_ever_is_refused_and_the_next_one_is_stored(video):
    with Sandbox(Limits(time_limit=3)) as sandbox:
        with (
            in_the_middle(sandbox, lambda helper: None),
            pytest.raises(BadVideo, match=r"not done after 3 s; .*--time-limit"),
        ):
            sandbox.store(video, SLOW)
        assert sandbox.store(video, TINY).num_frames == 40


def test_a_decoder_and_an_encoder_that_hang_are_killed(video):
    with (
        Sandbox(Limits(time_limit=3)) as sandbox,
        in_the_middle(sandbox, lambda helper: [each.suspend() for each in (*helper.children(), helper)]),
        pytest.raises(BadVideo, match="not done after 3 s"),
    ):
        sandbox.store(video, SLOW)


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A VP8 video whose header says 32 x 32, and whose first frame 16,000 x 14,000."""
    path = lavfi_video(
        tmp_path_factory.mktemp("huge") / "huge.ivf", "-c:v", "libvpx", "-deadline", "realtime", num_frames=4
    )
    data = bytearray(path.read_bytes())
    struct.pack_into("<HH", data, data.index(b"\x9d\x01\x2a") + 3, 16_000, 14_000)
    path.write_bytes(data)
    return path


def test_a_video_that_eats_memory_is_refused_and_the_next_one_is_stored(huge, video):
    with Sandbox(Limits(memory_limit=0.5, max_pixels=2**31 - 1)) as sandbox:
        for _ in range(2):
            with pytest.raises(BadVideo, match=r"needs more than 0\.5 GiB of memory; .*--memory-limit"):
                sandbox.store(huge, TINY)
            assert sandbox.store(video, TINY).num_frames == 40


def test_a_killed_packing_leaves_no_process_and_no_file_behind(video, tmp_path):
    script = (
        "import sys; from pathlib import Path; from shards.packing.sandbox import Sandbox\n"
        "from shards.video import Limits, Packing\n"
        "sandbox = Sandbox(Limits())\n"
        "sandbox.store(Path(sys.argv[1]), Packing(width=1920, height=1080, preset='placebo'))\n"
    )
    root = Path(__file__).parents[3]
    task = subprocess.Popen(
        [sys.executable, "-c", script, str(video)], cwd=root, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    try:
        wait_until(lambda: any(tmp_path.glob("*/*/video.mp4")))
        others = psutil.Process(task.pid).children(recursive=True)
        assert len(others) == 2  # the helper and its encoder
    finally:
        task.kill()
        task.wait()
    wait_until(lambda: not any(map(is_alive, others)) and not any(tmp_path.iterdir()))


def test_an_interrupted_packing_leaves_no_process_behind(video, sandbox):
    with (
        in_the_middle(sandbox, lambda helper: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        sandbox.store(video, SLOW)
    assert sandbox.store(video, TINY).num_frames == 40  # and it is of use again


def test_a_packer_takes_its_folder_along(video, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Sandbox(Limits()) as sandbox:
        sandbox.store(video, TINY)
        assert [path.name[:15] for path in tmp_path.iterdir()] == ["grurcn-sandbox-"]
    assert not list(tmp_path.iterdir())
