"""Videos decoded to their last frame or refused with a reason, stored, and read again by frame number."""

import re
import resource
import subprocess
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import (
    DATA,
    TINY,
    ffmpeg,
    frame_numbers,
    lavfi_video,
    level,
    needs_data,
    numbered_planes,
    write_video,
)

from shards.frames import turn
from shards.packing import decode_source as source_module
from shards.packing import transcode
from shards.packing.decode_source import decode_source
from shards.packing.encoder import video_encoder
from shards.packing.transcode import store_video
from shards.reading import decode
from shards.reading.decode import read_frames
from shards.video import BadVideo, Limits, Packing

ODD = DATA / "odd"


def decoded(path, packing=TINY):
    return np.stack(list(decode_source(path, packing)))


def encode(planes, target, packing, fps):
    """Stores planes (N, H * 3 // 2, W) and gives back how many there were."""
    with video_encoder(target, packing, fps) as encoder:
        for of_frame in planes:
            encoder.write(of_frame)
    return encoder.count


def luma(planes):
    """Planes (..., H * 3 // 2, W) -> (..., H, W), signed."""
    return planes[..., : planes.shape[-2] * 2 // 3, :].astype(int)


def mean_difference(planes, others):
    return float(np.abs(planes.astype(int) - others).mean())


def all_frames(data):
    """Every frame of a stored video (N, H * 3 // 2, W), decoded from the first to the last and not converted."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        Path(file.name).write_bytes(data)
        with av.open(file.name) as container:
            return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


# Files that are odd, from other projects' bug reports


@needs_data
@pytest.mark.parametrize(
    ("name", "num_frames"),
    [
        ("carphone_pristine.mp4", 120),
        ("h265_10bits.mp4", 30),
        ("hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi", 83),
        ("nasa_13013.mp4", 390),
        ("realshort.mp4", 36),
        ("unordered.mov", 4),
        ("video_90.mov", 3),
    ],
)
def test_an_odd_file_is_stored_with_all_its_frames(name, num_frames):
    stored = store_video(ODD / name, TINY)
    assert stored.num_frames == num_frames
    assert len(all_frames(stored.data)) == num_frames


@needs_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("zero_length.avi", "the file is empty"),
        ("not_a_video_text.avi", "not a video that ffmpeg reads .Invalid data found"),
        ("wav.wav", r"no video stream .streams found: audio."),
        ("mp4-with-audio.mp4", r"no video stream .streams found: audio."),
        ("corrupted.mp4", r"frame \d+ of 50 does not decode .Invalid data found"),
        ("v_YoYo_g01_c01.truncated_half.avi", r"frame 85 of 187 does not decode .damaged data"),
        ("v_YoYo_g01_c01.middle_4000B_ff.avi", r"frame \d+ of 187 does not decode .decoded with errors"),
    ],
)
def test_an_odd_file_that_does_not_decode_to_its_end_is_refused_with_the_reason(name, reason):
    with pytest.raises(BadVideo, match=reason):
        store_video(ODD / name, TINY)
    with pytest.raises(BadVideo, match=reason):
        store_video(ODD / name, Packing(width=32, height=32, copy=True))


@needs_data
def test_every_odd_file_is_in_one_of_the_two_lists_above():
    assert len([path for path in ODD.iterdir() if path.is_file()]) == 7 + 7


# Cut off, damaged, or only odd

CODECS = {
    "avi": ("-c:v", "mpeg4"),
    "mp4": ("-c:v", "libx264", "-movflags", "+faststart"),
    "mkv": ("-c:v", "libx264", "-preset", "ultrafast"),
    "webm": ("-c:v", "libvpx", "-deadline", "realtime"),
    "flv": (),
    "wmv": (),
    "mpg": (),
}


@pytest.fixture(scope="module", params=CODECS)
def whole(request, tmp_path_factory):
    """A whole video of 40 frames, in each container."""
    path = tmp_path_factory.mktemp("whole") / f"whole.{request.param}"
    return lavfi_video(path, *CODECS[request.param], num_frames=40)


def test_a_whole_file_is_decoded_to_its_last_frame(whole):
    assert len(decoded(whole)) == 40


# Of a cut MPEG or ASF file ffmpeg knows no length: cut between two frames, it looks whole.
@pytest.mark.parametrize("whole", ["avi", "mp4", "mkv", "webm", "flv"], indirect=True)
@settings(max_examples=12, deadline=None)
@given(share=st.floats(0.02, 0.5), padded=st.booleans())
def test_a_file_that_was_cut_off_anywhere_is_refused(whole, share, padded):
    data = whole.read_bytes()
    length = int(len(data) * share)
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / f"cut{whole.suffix}"
        cut.write_bytes(data[:length] + bytes(len(data) - length if padded else 0))  # a download that was given up
        with pytest.raises(BadVideo):
            decoded(cut)


@needs_data
def test_a_real_avi_cut_between_two_frames_is_refused(tmp_path):
    """No packet is damaged then: only the header knows that more should come."""
    data = (DATA / "ucf101/videos/YoYo/v_YoYo_g01_c01.avi").read_bytes()
    hundredth = [match.start() for match in re.finditer(b"00dc", data)][99]
    (tmp_path / "cut.avi").write_bytes(data[:hundredth])
    with pytest.raises(BadVideo, match=r"ends after 3\.9\d of the 7\.48 s that its header promises"):
        decoded(tmp_path / "cut.avi")


# In FLV and ASF ffmpeg passes over a damaged packet without a word.
@pytest.mark.parametrize("whole", ["avi", "mp4", "mkv", "webm", "mpg"], indirect=True)
def test_a_damaged_file_is_refused(whole):
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = b"\xff" * 2000
    damaged = whole.with_name(f"damaged{whole.suffix}")
    damaged.write_bytes(data)
    with pytest.raises(BadVideo):
        decoded(damaged)


def test_a_file_whose_sound_goes_on_after_the_last_frame_is_whole(tmp_path):
    path = tmp_path / "sound.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=32x32:rate=25:duration=1", "-f", "lavfi", "-i", "sine=duration=6", path)
    assert len(decoded(path)) == 25


def test_a_file_that_hides_its_first_half_gives_the_other(tmp_path):
    """An edit list, as in a cut without re-encoding: the header counts the hidden frames too."""
    lavfi_video(tmp_path / "long.mp4", "-g", 100, num_frames=40)
    ffmpeg("-ss", "0.8", "-i", tmp_path / "long.mp4", "-c", "copy", tmp_path / "cut.mp4")
    assert len(decoded(tmp_path / "cut.mp4")) == 20


@pytest.mark.parametrize("name", ["pauses.avi", "pauses.mkv", "pauses.mp4"])
def test_a_file_of_a_changing_frame_rate_is_whole(name, tmp_path):
    source = "testsrc2=size=32x32:rate=25,select='lt(n,10)+not(mod(n,10))'"
    lavfi_video(tmp_path / name, "-fps_mode", "vfr", source=source, num_frames=14)
    assert len(decoded(tmp_path / name)) == 14


def test_a_file_that_starts_late_is_whole(tmp_path):
    path = lavfi_video(tmp_path / "late.mkv", "-output_ts_offset", "100", num_frames=10)
    assert len(decoded(path)) == 10


def test_a_song_with_a_cover_picture_is_not_a_video(tmp_path):
    lavfi_video(tmp_path / "cover.jpg", num_frames=1)
    ffmpeg(
        *("-f", "lavfi", "-i", "sine=duration=1", "-i", tmp_path / "cover.jpg", "-map", 0, "-map", 1),
        *("-c:v", "copy", "-disposition:v", "attached_pic", tmp_path / "song.mp4"),
    )
    with pytest.raises(BadVideo, match=r"no video stream .streams found: audio, cover picture."):
        store_video(tmp_path / "song.mp4", TINY)


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile secret.avi\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.avi\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        '<?xml version="1.0"?>\n<MPD><Period><AdaptationSet><BaseURL>secret.avi</BaseURL></AdaptationSet></Period></MPD>',
    ],
    ids=["concat", "hls", "sdp", "dash"],
)
@pytest.mark.parametrize("copy", [False, True])
def test_a_script_that_points_to_another_file_is_not_a_video(script, copy, tmp_path):
    write_video(tmp_path / "secret.avi", numbered_planes(8))
    (tmp_path / "innocent.avi").write_text(script)
    with pytest.raises(BadVideo, match="not a video that ffmpeg reads"):
        store_video(tmp_path / "innocent.avi", Packing(width=32, height=32, copy=copy))
    with pytest.raises(BadVideo, match="does not decode"):
        read_frames(script.encode(), [0], TINY)


def test_a_file_name_is_a_file_and_not_a_protocol(tmp_path, monkeypatch):
    write_video(tmp_path / "a.avi", numbered_planes(8))
    monkeypatch.chdir(tmp_path)
    Path("concat:a.avi").write_bytes(b"")
    with pytest.raises(BadVideo, match="the file is empty"):
        store_video(Path("concat:a.avi"), TINY)
    Path("concat:a.avi").write_bytes(b"not empty")
    with pytest.raises(BadVideo, match="not a video that ffmpeg reads"):
        store_video(Path("concat:a.avi"), TINY)


# Turned and coloured


def by_ffmpeg(path, width, height):
    """The frames as the ffmpeg program shows them (N, H * 3 // 2, W): it turns them by itself."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-fps_mode", "passthrough"]
    command += ["-vf", f"scale={width}:{height}:flags=bicubic,format=yuv420p", "-f", "rawvideo", "-"]
    raw = subprocess.run(command, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height * 3 // 2, width)


@needs_data
def test_a_phone_video_is_stored_upright():
    packing = Packing(width=64, height=96)
    shown, ours = by_ffmpeg(ODD / "video_90.mov", 64, 96), decoded(ODD / "video_90.mov", packing)
    assert mean_difference(ours, shown) < 2
    assert mean_difference(np.stack([turn(planes, 2) for planes in ours]), shown) > 20  # upside down
    stored = store_video(ODD / "video_90.mov", packing)
    assert mean_difference(read_frames(stored.data, [0, 1, 2], packing), shown) < 3


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_every_quarter_turn_is_ffmpegs(degrees, tmp_path):
    lavfi_video(tmp_path / "flat.mp4", "-pix_fmt", "yuv420p", source="testsrc2=size=64x48:rate=25", num_frames=3)
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "turned.mp4")
    width, height = (48, 64) if degrees % 180 else (64, 48)
    for copy in (False, True):
        packing = Packing(width=width, height=height, copy=copy)
        shown = by_ffmpeg(tmp_path / "turned.mp4", width, height)
        np.testing.assert_array_equal(decoded(tmp_path / "turned.mp4", packing), shown)
    read = read_frames((tmp_path / "turned.mp4").read_bytes(), [0, 1, 2], packing)
    np.testing.assert_array_equal(read, shown)


def test_turning_moves_each_pixel_as_worked_by_hand():
    """Luma 2 x 4 and chroma 1 x 2; a quarter turn counter-clockwise puts the right column on top.

    0 1 2 3        3 7
    4 5 6 7        2 6      U: 8 9 -> 9    V: 10 11 -> 11
                   1 5              8               10
                   0 4
    """
    planes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert turn(planes, 1).tolist() == [[3, 7], [2, 6], [1, 5], [0, 4], [9, 8], [11, 10]]
    assert turn(planes, 2).tolist() == [[7, 6, 5, 4], [3, 2, 1, 0], [9, 8, 11, 10]]
    np.testing.assert_array_equal(turn(turn(planes, 1), 3), planes)


# (Y, U, V) of BT.601, limited range, by hand: Y = 16 + 219 (.299 R + .587 G + .114 B), chroma 128 +- 112.
COLOURS = {"red": (81, 90, 240), "lime": (145, 54, 34), "blue": (41, 240, 110), "white": (235, 128, 128)}
CODINGS = {
    "BT.601, not tagged": ("-vf", "scale=out_color_matrix=bt601:out_range=tv,format=yuv420p"),
    "BT.709": (
        *("-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p", "-color_range", "tv"),
        *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
    ),
    "BT.601, full range": (
        *("-vf", "scale=out_color_matrix=bt601:out_range=pc,format=yuv420p"),
        *("-colorspace", "smpte170m", "-color_range", "pc"),
    ),
    "motion JPEG": ("-vf", "format=yuvj444p", "-c:v", "mjpeg", "-q:v", "1"),
    "RGB": ("-c:v", "png", "-pix_fmt", "rgb24"),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_comes_back_as_bt601_however_it_was_coded(coding, colour, tmp_path):
    source = f"color={colour}:size=48x64:rate=25,format=rgb24"
    path = lavfi_video(tmp_path / "colour.mov", *CODINGS[coding], source=source, num_frames=2)

    [stored] = read_frames(store_video(path, TINY).data, [1], TINY)
    [copied] = read_frames(path.read_bytes(), [1], Packing(width=32, height=32, copy=True))

    for planes in (stored, copied):
        y, u, v = planes[:32], planes[32:40], planes[40:]
        assert [float(plane.mean()) for plane in (y, u, v)] == pytest.approx(COLOURS[colour], abs=2.5)


# Stored and read again


def test_stored_frames_are_close_to_the_decoded_ones(tmp_path):
    path = lavfi_video(tmp_path / "video.mp4", source="testsrc2=size=64x48:rate=30000/1001", num_frames=20)
    packing = Packing(width=64, height=48, crf=18)
    stored = store_video(path, packing)
    assert (stored.num_frames, stored.suffix) == (20, "mp4")
    assert stored.fps == pytest.approx(29.97, abs=0.001)
    frames, original = all_frames(stored.data), decoded(path, packing)
    assert frames.shape == (20, 72, 64)
    assert mean_difference(frames, original) < 3
    worse = store_video(path, Packing(width=64, height=48, crf=45))
    assert mean_difference(all_frames(worse.data), original) > 2 * mean_difference(frames, original)


def test_lossless_storing_keeps_every_pixel(tmp_path):
    rng = np.random.default_rng(0)
    planes = rng.integers(16, 236, (6, 48, 32), dtype=np.uint8)
    encode(planes, tmp_path / "stored.mp4", Packing(width=32, height=32, crf=0), Fraction(25))
    read = read_frames((tmp_path / "stored.mp4").read_bytes(), range(6), TINY)
    np.testing.assert_array_equal(read, planes)


def test_a_video_is_stretched_to_the_stored_size(tmp_path):
    """Left half black, right half white, of another shape: still half and half."""
    planes = np.full((2, 96, 48), 128, np.uint8)
    planes[:, :64, :24], planes[:, :64, 24:] = 16, 235
    write_video(tmp_path / "tall.avi", planes)
    stored = decoded(tmp_path / "tall.avi")
    assert stored.shape == (2, 48, 32)
    assert luma(stored)[:, :, :12].max() < 40
    assert luma(stored)[:, :, 20:].min() > 210


def test_storing_the_same_video_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    path = lavfi_video(tmp_path / "video.mp4", num_frames=20)
    first = store_video(path, Packing(width=64, height=48))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    assert store_video(path, Packing(width=64, height=48)) == first


def test_a_stored_video_tells_nothing_of_the_machine_that_made_it(tmp_path):
    """The encoder's number of threads changes its bytes; muxers write dates and versions."""
    stored = store_video(write_video(tmp_path / "video.avi", numbered_planes(8)), TINY)
    assert b" threads=1 " in stored.data  # in x264's own note of its options
    assert b"Lavf" not in stored.data
    (tmp_path / "stored.mp4").write_bytes(stored.data)
    with av.open(str(tmp_path / "stored.mp4")) as container:
        assert set(container.metadata) == {"major_brand", "minor_version", "compatible_brands"}


def test_key_frames_come_at_the_interval_even_where_the_scene_changes(tmp_path):
    planes = numbered_planes(20)
    planes[7:, :32] = 235
    encode(planes, tmp_path / "stored.mp4", Packing(width=32, height=32, gop=6), Fraction(25))
    with av.open(str(tmp_path / "stored.mp4")) as container:
        keys = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keys == [0, 6, 12, 18]


@settings(max_examples=40, deadline=None)
@given(
    num_frames=st.integers(1, 40),
    gop=st.integers(1, 20),
    preset=st.sampled_from(["ultrafast", "medium"]),  # medium has B-frames
    fps=st.sampled_from(["25", "30000/1001", "1", "240", "45000/1499", "1000000/33333", "123457/10007"]),
    data=st.data(),
)
def test_reading_by_number_is_the_same_as_decoding_from_the_start(num_frames, gop, preset, fps, data):
    packing = Packing(width=32, height=32, gop=gop, preset=preset)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stored.mp4"
        assert encode(numbered_planes(num_frames), target, packing, Fraction(fps)) == num_frames
        stored = target.read_bytes()
    frames = all_frames(stored)
    assert frame_numbers(frames) == list(range(num_frames))
    for number in range(num_frames):
        np.testing.assert_array_equal(read_frames(stored, [number], packing)[0], frames[number])
    wanted = data.draw(st.lists(st.integers(0, num_frames - 1), min_size=1, max_size=12))  # any order, repeats
    np.testing.assert_array_equal(read_frames(stored, wanted, packing), frames[wanted])


def test_reading_starts_at_the_last_key_frame_before_the_first_wanted_one(tmp_path, monkeypatch):
    """So that a clip's cost does not grow with its place in the video."""
    packing = Packing(width=32, height=32, gop=4)
    encode(numbered_planes(40), tmp_path / "stored.mp4", packing, Fraction(25))
    seen = []

    def spy(container, stream, first, gop):
        for number, frame in numbered(container, stream, first, gop):
            seen.append(number)
            yield number, frame

    numbered = decode.decode_gops
    monkeypatch.setattr(decode, "decode_gops", spy)
    stored = (tmp_path / "stored.mp4").read_bytes()
    read_frames(stored, [30, 31, 32], packing)
    assert [number for number in seen if number != 29] == [28, 30, 31, 32]
    # 29 is decoded if a later frame is predicted from it
    track = decode.read_track(stored)
    assert (29 in seen) == decode.is_reference(stored, track.offsets[track.numbers.index(29)])


def test_frames_before_the_first_wanted_one_from_which_none_is_predicted_are_not_decoded(tmp_path):
    packing = Packing(width=32, height=32, gop=16)
    encode(numbered_planes(32), tmp_path / "stored.mp4", packing, Fraction(25))
    stored = (tmp_path / "stored.mp4").read_bytes()
    track = decode.read_track(stored)
    alone = {
        number
        for number, start in zip(track.numbers, track.offsets, strict=False)
        if not decode.is_reference(stored, start)
    }
    assert len(alone & set(range(16, 30))) > 3  # B-frames
    decoded = [number for number, _ in decode.decode_gops(stored, track, {30, 31}, packing.gop)]
    assert decoded == [number for number in range(16, 32) if number >= 30 or number not in alone]


@pytest.mark.parametrize("preset", ["ultrafast", "medium"])
def test_a_frame_after_the_last_is_refused(preset, tmp_path):
    packing = Packing(width=32, height=32, gop=4, preset=preset)
    encode(numbered_planes(10), tmp_path / "stored.mp4", packing, Fraction(25))
    with pytest.raises(BadVideo, match="the video ends before frame 10"):
        read_frames((tmp_path / "stored.mp4").read_bytes(), [9, 10], packing)


def test_bytes_that_are_not_a_video_are_refused_when_read():
    with pytest.raises(BadVideo, match=r"does not decode .Invalid data found"):
        read_frames(b"not a video" * 100, [0], TINY)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_copied_video_keeps_its_bytes_and_gives_the_right_frames(codec, tmp_path):
    path = write_video(tmp_path / "Video.AVI", numbered_planes(30, height=48, width=64), codec=codec)
    packing = Packing(width=32, height=32, copy=True)

    stored = store_video(path, packing)

    assert (stored.data, stored.suffix) == (path.read_bytes(), "avi")
    assert (stored.num_frames, stored.fps) == (30, 25)
    wanted = [29, 0, 17, 17, 5]
    read = read_frames(stored.data, wanted, packing)
    assert frame_numbers(read) == wanted
    np.testing.assert_array_equal(read, decoded(path)[wanted])


@needs_data
def test_a_copied_video_with_timestamps_that_jump_gives_the_right_frames():
    path = DATA / "ut-interaction" / "Hugging" / "53_9_1.avi"
    packing = Packing(width=64, height=48, copy=True)
    frames = decoded(path, packing)
    wanted = [len(frames) - 1, 3, 40]
    np.testing.assert_array_equal(read_frames(path.read_bytes(), wanted, packing), frames[wanted])


# Segments


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """40 numbered frames, 25 a second."""
    return write_video(tmp_path_factory.mktemp("forty") / "forty.avi", numbered_planes(40))


@pytest.mark.parametrize(
    ("start", "end", "first", "stop"),
    [
        (None, None, 0, 40),
        (0.0, 1.6, 0, 40),
        (0.4, 1.2, 10, 30),  # frame 30, at 1.2 s, is not in it
        (None, 1.0, 0, 25),
        (1.0, None, 25, 40),
        (0.41, 0.43, 10, 11),  # 10.25 and 10.75 frames
        (1.56, 1.6, 39, 40),
        (1.0, 1.7, 25, 40),  # two of 17 frames are not there
        (1.52, 1.8, 38, 40),  # five of seven are not, but lists are only exact to 0.2 s
    ],
)
def test_a_segment_holds_the_frames_between_its_seconds(start, end, first, stop, forty):
    stored = store_video(forty, TINY, start, end)
    assert (stored.num_frames, stored.fps) == (stop - first, 25)
    assert frame_numbers(all_frames(stored.data)) == list(range(first, stop))


@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 39), length=st.integers(1, 40), rate=st.sampled_from(["25", "30000/1001", "240", "7/3"]))
def test_segments_that_follow_each_other_share_no_frame_and_leave_none_out(first, length, rate):
    """Frame n lasts from n / rate to (n + 1) / rate; a list may say that with a few digits only."""
    fps = Fraction(rate)
    stop = min(first + length, 40)
    at_start, at_end = round(float(first / fps), 3), round(float(stop / fps), 3)
    assert transcode.segment_bounds(at_start, at_end, fps) == (first, stop)
    assert transcode.segment_bounds(at_end, None, fps) == (stop, None)


def test_a_segment_has_the_flow_of_its_own_frames(forty):
    pytest.importorskip("cv2")
    stored = store_video(forty, replace(TINY, flow="dis"), 0.4, 0.8)
    assert stored.flow is not None
    assert stored.num_frames == len(all_frames(stored.flow)) == 10


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (1.2, 3.2, r"the segment from 1\.20 s to 3\.20 s has 50 frames, but the video ends after 10 of them"),
        (5.0, 6.0, r"the segment from 5\.00 s to 6\.00 s begins after the video's end"),
        (1.6, None, r"the segment from 1\.60 s on begins after the video's end"),
        (1.01, 1.012, r"the segment from 1\.00 s to 1\.00 s holds no frame at 25 frames a second"),
    ],
)
def test_a_segment_that_is_not_there_is_refused(start, end, message, forty):
    with pytest.raises(BadVideo, match=message):
        store_video(forty, TINY, start, end)


@pytest.mark.parametrize(
    ("start", "end"), [(-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("nan"))]
)
def test_a_segment_of_nonsense_is_no_fault_of_the_video(start, end, forty):
    with pytest.raises(ValueError, match=r"a segment from .* s: expected 0 <= start < end") as caught:
        store_video(forty, TINY, start, end)
    assert not isinstance(caught.value, BadVideo)


def test_copying_a_segment_is_refused(forty):
    with pytest.raises(ValueError, match="copy keeps whole files") as caught:
        store_video(forty, replace(TINY, copy=True), 0.4, 1.2)
    assert not isinstance(caught.value, BadVideo)


def test_what_lies_behind_a_segment_is_not_looked_at_and_what_lies_before_is(tmp_path):
    path = lavfi_video(tmp_path / "whole.avi", "-c:v", "mpeg4", num_frames=40)
    data = bytearray(path.read_bytes())
    packet = [match.start() for match in re.finditer(b"00dc", data) if match.start() > data.index(b"movi")][30]
    size = int.from_bytes(data[packet + 4 : packet + 8], "little")
    (tmp_path / "cut.avi").write_bytes(data[:packet])
    data[packet + 8 : packet + 8 + size] = b"\xff" * size
    (tmp_path / "damaged.avi").write_bytes(data)

    assert store_video(tmp_path / "damaged.avi", TINY, 0.4, 1.2).num_frames == 20
    assert store_video(tmp_path / "cut.avi", TINY, 0.4, 1.2).num_frames == 20
    for start, end in [(0.0, 1.24), (1.4, 1.6), (1.4, None)]:
        with pytest.raises(BadVideo, match="frame 31 of 40 does not decode"):
            store_video(tmp_path / "damaged.avi", TINY, start, end)
    with pytest.raises(BadVideo, match="its header promises"):
        store_video(tmp_path / "cut.avi", TINY, 0.4)


def test_frames_before_a_segment_are_not_scaled(forty, monkeypatch):
    scaled = []
    monkeypatch.setattr(source_module, "to_planes", lambda frame, *_: scaled.append(frame) or numbered_planes(1)[0])
    store_video(forty, TINY, 0.4, 1.2)
    assert len(scaled) == 20


def test_a_frame_rate_that_is_nonsense_counts_as_25(tmp_path):
    path = lavfi_video(tmp_path / "fast.avi", "-r", "1000", source="testsrc2=size=32x32:rate=1000")
    assert store_video(path, TINY).fps == 25


def encoders():
    """The ffmpeg processes of this one, which may have other children: other tests start some that stay."""
    found = psutil.Process().children()
    return [one for one in found if one.status() != psutil.STATUS_ZOMBIE and one.name().startswith("ffmpeg")]


@pytest.mark.parametrize("flow", ["none", "dis"])
def test_a_video_that_breaks_off_and_an_encoder_that_dies_leave_no_process_behind(flow, tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.avi", numbered_planes(40))

    def until(number, error):
        def frames(*_):
            for count, planes in enumerate(numbered_planes(40)):
                if count == number:
                    assert len(encoders()) == (1 if flow == "none" else 2)
                    error()
                yield planes

        monkeypatch.setattr(transcode, "decode_source", frames)

    def break_off():
        raise BadVideo("breaks off")

    until(20, break_off)
    with pytest.raises(BadVideo, match="breaks off"):
        store_video(path, replace(TINY, flow=flow))
    assert not encoders()

    until(20, lambda: [process.kill() for process in encoders()])
    with pytest.raises(OSError, match=r"ffmpeg ended with status -9 after \d+ frames"):
        store_video(path, replace(TINY, flow=flow))
    assert not encoders()


def test_a_stored_video_that_grows_beyond_the_largest_file_allowed_is_refused(tmp_path):
    planes = np.random.default_rng(0).integers(16, 236, (200, 48, 32), dtype=np.uint8)
    encoder = video_encoder(tmp_path / "stored.mp4", TINY, Fraction(25))
    resource.prlimit(encoder.process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(BadVideo, match=r"its first \d+ frames fill the largest file allowed"), encoder:
        list(encoder.passing(planes))


def test_a_preset_that_the_encoder_does_not_know_is_an_error_and_not_a_bad_video(tmp_path):
    path = write_video(tmp_path / "video.avi", numbered_planes(8))
    with pytest.raises(OSError, match=r"ffmpeg ended with status .*hasty"):
        store_video(path, Packing(width=32, height=32, preset="hasty"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 341}, "341 x 256 frames: expected even sizes of at least 16"),
        ({"height": 14}, "340 x 14 frames: expected even sizes of at least 16"),
        ({"gop": 0}, "gop 0: expected at least 1"),
        ({"crf": 52}, "crf 52: expected 0 .lossless. to 51"),
        ({"flow_crf": -1}, "flow_crf -1: expected 0 .lossless. to 51"),
        ({"flow": "farneback"}, "flow 'farneback': expected one of none, tvl1, dis"),
        ({"flow_bound": 0.0}, "flow_bound 0: expected above 0 and below 1000 pixels"),
        ({"flow_bound": float("nan")}, "flow_bound nan"),
    ],
)
def test_packing_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Packing(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_limit": 0.0}, "time_limit 0: expected above 0 and at most 1,000,000 seconds"),
        ({"time_limit": float("nan")}, "time_limit nan"),
        ({"memory_limit": 0.25}, r"memory_limit 0\.25: expected 0\.5 to 1,000,000 GiB"),
        ({"max_pixels": 0}, "max_pixels 0: expected 1 to 2,147,483,647"),
    ],
)
def test_limits_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Limits(**options)


def test_a_video_whose_tv_l1_flow_is_wanted_has_more_time():
    assert Limits().seconds(TINY) == Limits().seconds(replace(TINY, flow="dis")) == 600
    assert Limits().seconds(replace(TINY, flow="tvl1")) == 7200
    assert Limits(time_limit=5).seconds(replace(TINY, flow="tvl1")) == 5


def test_the_levels_of_numbered_frames_survive_the_codec(tmp_path):
    """What the tests above rest on."""
    stored = store_video(write_video(tmp_path / "video.avi", numbered_planes(40)), TINY)
    found = luma(all_frames(stored.data)).mean(axis=(1, 2))
    np.testing.assert_allclose(found, [level(number) for number in range(40)], atol=1.5)
