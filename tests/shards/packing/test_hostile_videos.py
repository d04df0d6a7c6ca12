"""A stranger's video: whatever it names or promises, it is refused by name and harms nothing."""

import os
import selectors
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import pytest
from videos import TINY, ffmpeg, lavfi_video, numbered_planes, write_video

from shards.packing.sandbox import Sandbox
from shards.packing.transcode import store_video
from shards.video import BadVideo, Limits, Packing

COPY = Packing(width=32, height=32, copy=True)


SECONDS = 60  # long enough for anything that ends at all


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(time_limit=SECONDS)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "video.avi", numbered_planes(40))


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


# Headers that promise the moon


def changed(path: Path, target: Path, *changes: tuple[bytes, int, str, tuple[int, ...]]) -> Path:
    """A copy with numbers written over: after which name, how far, struct's format, the numbers."""
    data = bytearray(path.read_bytes())
    for name, offset, form, numbers in changes:
        struct.pack_into(form, data, data.index(name) + len(name) + offset, *numbers)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("packing", [TINY, COPY])
def test_a_header_that_promises_a_milliard_frames_is_refused(packing, video, tmp_path, sandbox):
    lying = changed(video, tmp_path / "lying.avi", (b"avih", 20, "<I", (10**9,)), (b"strh", 36, "<I", (10**9,)))
    with pytest.raises(BadVideo, match=r"ends after 1\.60 of the 40000000\.00 s that its header promises"):
        sandbox.store(lying, packing)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (16_000, r"frames of 16,000 x 16,000 pixels: expected at most 35,389,440 pixels .--max-pixels."),
        (100_000, "frame 1 of 2 does not decode"),  # ffmpeg itself does not believe it
    ],
)
def test_a_header_that_promises_huge_frames_is_refused(size, reason, tmp_path, sandbox):
    raw = lavfi_video(tmp_path / "raw.avi", "-c:v", "rawvideo", "-pix_fmt", "yuv420p", num_frames=2)
    lying = changed(raw, tmp_path / "lying.avi", (b"strf", 8, "<ii", (size, size)))
    with pytest.raises(BadVideo, match=reason):
        sandbox.store(lying, TINY)


def test_a_frame_that_is_larger_than_its_header_says_is_refused(huge, sandbox):
    with pytest.raises(BadVideo, match=r"frame 1 of 4 does not decode .Picture size 16000x14000 exceeds .* 35389440"):
        sandbox.store(huge, TINY)


def test_frames_that_grow_in_the_middle_of_a_video_are_refused(tmp_path):
    parts = [
        lavfi_video(tmp_path / f"{size}.h264", source=f"testsrc2=size={size}x{size}:rate=25", num_frames=4)
        for size in (32, 256)
    ]
    (tmp_path / "growing.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert store_video(tmp_path / "growing.h264", TINY).num_frames == 8
    with Sandbox(Limits(max_pixels=64 * 64)) as sandbox:
        assert sandbox.store(parts[0], TINY).num_frames == 4
        with pytest.raises(BadVideo, match=r"frames of 256 x 256 pixels: expected at most 4,096"):
            sandbox.store(parts[1], TINY)
        with pytest.raises(BadVideo, match=r"frame [1-5] does not decode"):
            sandbox.store(tmp_path / "growing.h264", TINY)


@pytest.mark.parametrize(("rate", "scale"), [(0, 0), (25, 0), (0, 1), (2**32 - 1, 1), (1, 2**32 - 1)])
def test_a_frame_rate_of_nonsense_does_no_harm(rate, scale, video, tmp_path, sandbox):
    odd = changed(video, tmp_path / "odd.avi", (b"strh", 24, "<II", (scale, rate)))
    stored = sandbox.store(odd, TINY)
    assert (stored.num_frames, stored.fps) == (40, 25)


BOX = struct.Struct(">I4s")


TRACK = (b"moov", b"trak")


TABLES = (*TRACK, b"mdia", b"minf", b"stbl")


def with_box(data: bytes, names: tuple[bytes, ...], content: bytes, copies: int = 1) -> bytes:
    """A mov, its moov at the end, with other content in the box moov/trak/..., and all boxes around it grown."""
    start, starts = 0, []
    for name in names:
        size, found = BOX.unpack_from(data, start)
        while found != name:
            start += size
            size, found = BOX.unpack_from(data, start)
        starts.append(start)
        start += BOX.size
    box = (BOX.pack(BOX.size + len(content), names[-1]) + content) * copies
    old_size, _ = BOX.unpack_from(data, starts[-1])
    whole = bytearray(data[: starts[-1]] + box + data[starts[-1] + old_size :])
    for place in starts[:-1]:
        size, name = BOX.unpack_from(data, place)
        BOX.pack_into(whole, place, size + len(box) - old_size, name)
    return bytes(whole)


@pytest.fixture(scope="module")
def mov(tmp_path_factory):
    return lavfi_video(tmp_path_factory.mktemp("mov") / "video.mov", "-c:v", "mjpeg", num_frames=4).read_bytes()


def test_tables_of_a_milliard_frames_are_refused(mov, tmp_path, sandbox):
    for name, numbers in {b"stsz": (0, 100, 10**9), b"stsc": (0, 1, 1, 10**9, 1), b"stts": (0, 1, 10**9, 512)}.items():
        mov = with_box(mov, (*TABLES, name), struct.pack(f">{len(numbers)}I", *numbers))
    (tmp_path / "lying.mov").write_bytes(mov)
    with pytest.raises(BadVideo):
        sandbox.store(tmp_path / "lying.mov", TINY)


def test_a_file_of_thousands_of_tracks_is_refused(mov, tmp_path, sandbox):
    start = mov.index(b"trak") - 4
    track = mov[start + BOX.size : start + BOX.unpack_from(mov, start)[0]]
    (tmp_path / "many.mov").write_bytes(with_box(mov, TRACK, track, copies=3000))
    with pytest.raises(BadVideo, match="not a video that ffmpeg reads"):
        sandbox.store(tmp_path / "many.mov", TINY)


def test_a_stream_that_no_decoder_knows_is_refused(video, tmp_path, sandbox):
    unknown = tmp_path / "unknown.avi"
    unknown.write_bytes(video.read_bytes().replace(b"FMP4", b"?!?!"))
    with pytest.raises(BadVideo, match="no decoder for its video stream"):
        sandbox.store(unknown, TINY)


# Files that name others


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server on this machine that must see no connection."""
    with socket.create_server(("127.0.0.1", 0)) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        yield server
        assert not selector.select(timeout=0), "something connected"


def address(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


SCRIPTS = {  # by the suffix that gives them away
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile {}\n",
    "mpd": '<?xml version="1.0"?>\n<MPD><Period><AdaptationSet><BaseURL>{}</BaseURL></AdaptationSet></Period></MPD>',
    "asx": '<ASX version="3.0"><Entry><Ref href="{}"/></Entry></ASX>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\na=control:{}\nm=video 5004 RTP/AVP 96\n",
    "ref": "[Reference]\nRef1={}\n",
    "qtl": '<?xml version="1.0"?>\n<?quicktime type="application/x-quicktime-media-link"?>\n<embed src="{}"/>',
}


@pytest.mark.parametrize("target", ["http://{}/x.ts", "rtsp://{}/x", "tcp://{}", "/etc/passwd", "secret.avi"])
@pytest.mark.parametrize("suffix", SCRIPTS)
def test_a_script_that_points_elsewhere_is_refused(suffix, target, video, tmp_path, listener, shared_sandbox):
    shutil.copy(video, tmp_path / "secret.avi")
    for name in ("innocent.avi", f"honest.{suffix}"):
        (tmp_path / name).write_text(SCRIPTS[suffix].format(target.format(address(listener))))
        for packing in (TINY, COPY):
            with pytest.raises(BadVideo, match="not a video that ffmpeg reads"):
                shared_sandbox.store(tmp_path / name, packing)


def test_a_playlist_would_connect_if_it_were_let(tmp_path):
    """What the tests here rest on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "honest.m3u8").write_text(SCRIPTS["m3u8"].format(f"http://{address(server)}/x.ts"))
        said = []

        def answer_once() -> None:
            connection, _ = server.accept()
            with connection:
                said.append(connection.recv(100))

        thread = threading.Thread(target=answer_once)
        thread.start()
        with pytest.raises(av.error.FFmpegError):
            av.open(str(tmp_path / "honest.m3u8"), options={"protocol_whitelist": "file,http,tcp"})
        thread.join(SECONDS)
    assert said[0].startswith(b"GET /x.ts")


@pytest.fixture(scope="module")
def shared_sandbox():
    with Sandbox(Limits(time_limit=SECONDS)) as sandbox:
        yield sandbox


def alias(target: str) -> bytes:
    """A data reference (dref) of one entry: an alias to an absolute path, as Final Cut's reference movies have it."""
    name = target.rsplit("/", 1)[-1].encode()
    path = target.encode() + b"\0" * (len(target) % 2)
    record = bytes(14) + struct.pack("28p", b"volume") + bytes(12) + struct.pack("64p", name) + bytes(16)
    record += struct.pack(">hh", 1, 1) + bytes(16)  # levels from here to the target
    record += struct.pack(">hH", 2, len(path)) + path + struct.pack(">hH", -1, 0) + bytes(16)
    return struct.pack(">II", 0, 1) + BOX.pack(BOX.size + len(record), b"alis") + record


def test_a_mov_whose_frames_are_in_another_file_is_refused(mov, tmp_path, listener, sandbox):
    secret, innocent = tmp_path / "secret.mov", tmp_path / "innocent.mov"
    secret.write_bytes(mov)
    place = (*TRACK, b"mdia", b"minf", b"dinf", b"dref")
    innocent.write_bytes(with_box(mov.replace(b"\xff\xd8\xff", b"???"), place, alias(str(secret))))
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(innocent), options=options) as container:  # so the reference is one that ffmpeg could follow
        assert len(list(container.decode(video=0))) == 4
    with pytest.raises(BadVideo, match="the video stream has no frames"):
        sandbox.store(innocent, TINY)
    innocent.write_bytes(with_box(mov, place, alias(f"http://{address(listener)}/secret.mov")))
    with pytest.raises(BadVideo, match="the video stream has no frames"):
        sandbox.store(innocent, TINY)


def test_a_playlist_in_the_subtitles_of_an_avi_is_not_followed(tmp_path, listener, sandbox):
    """The GAB2 trick: ffmpeg guesses the format of what an AVI's subtitle packet holds."""
    path = tmp_path / "subtitles.avi"
    sound = ("-f", "lavfi", "-i", "sine=duration=1")
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=32x32:rate=25", *sound, "-frames:v", 20, "-c:a", "pcm_s16le", path)
    playlist = SCRIPTS["m3u8"].format(f"http://{address(listener)}/x.ts").encode()
    data = bytearray(path.read_bytes().replace(b"auds\1\0\0\0", b"txts\0\0\0\0"))
    assert b"txts" in data
    packet = data.index(b"01wb", data.index(b"movi")) + 8
    size = int.from_bytes(data[packet - 4 : packet], "little")
    gab2 = b"GAB2\0" + struct.pack("<HIHI", 2, 0, 4, len(playlist)) + playlist
    data[packet : packet + size] = gab2.ljust(size, b"\n")
    path.write_bytes(data)
    assert sandbox.store(path, TINY).num_frames == 20


@pytest.mark.parametrize(
    "name",
    ["concat:a.avi|b.avi", "subfile,,start,0,end,0,,:a.avi", "file:a.avi", "pipe:0", "%03d.avi", "*.avi", "-i.avi"],
)
def test_a_file_name_that_ffmpeg_would_take_for_more_is_a_name(name, video, tmp_path, monkeypatch, sandbox):
    monkeypatch.chdir(tmp_path)
    shutil.copy(video, name)
    assert sandbox.store(Path(name), TINY).num_frames == 40


def test_what_is_not_a_regular_file_is_refused_before_it_is_opened(tmp_path, sandbox):
    os.mkfifo(tmp_path / "pipe.avi")
    for path in (tmp_path / "pipe.avi", tmp_path, Path("/dev/zero")):
        with pytest.raises(BadVideo, match="not a regular file"):
            sandbox.store(path, TINY)
