"""Source videos decoded to their last frame, or refused with a reason."""

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import (
    DATA,
    TINY,
    all_frames,
    decoded,
    ffmpeg,
    lavfi_video,
    needs_data,
    numbered_planes,
    write_video,
)

from shards.packing.transcode import store_video
from shards.reading.decode import read_frames
from shards.video import BadVideo, Packing

ODD = DATA / "odd"


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
