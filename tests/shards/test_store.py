"""Files of folders and object stores: right bytes, bounded open files, patience with what passes, and clear words otherwise."""

import errno
import os
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from s3fs import S3FileSystem
from servers import (
    KEYS,
    RangeServer,
    answer_short,
    first,
    gs_server,
    hang_up,
    ignore_range,
    s3_server,
    status,
)

from shards import store as store_module
from shards.store import BadShards, BadUrl, FolderStore, NoFile, absolute_url, open_store, retry


@pytest.fixture
def folder(tmp_path):
    """Ten files of 1,000 bytes, each told apart by its bytes."""
    for number in range(10):
        (tmp_path / f"{number}.tar").write_bytes(content(number))
    return tmp_path


def content(number):
    return np.random.default_rng(number).bytes(1000)


def open_files(folder):
    """The files of the folder that this process holds open."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return Counter(str(link.readlink()) for link in links if link.resolve().is_relative_to(folder))


@pytest.fixture
def no_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    return pauses


def failing_pread(monkeypatch, times, number=errno.EIO):
    """os.pread fails so many times, then works. Gives back the list of its calls."""
    calls = []
    pread = os.pread

    def flaky(*args):
        calls.append(args)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return pread(*args)

    monkeypatch.setattr(os, "pread", flaky)
    return calls


@pytest.mark.parametrize(("offset", "size"), [(0, 1000), (0, 1), (999, 1), (512, 300), (1000, 0)])
def test_a_range_is_the_files_bytes(offset, size, folder):
    assert FolderStore(folder).read("3.tar", offset, size) == content(3)[offset : offset + size]


def test_a_read_that_comes_in_parts_is_put_together(folder, monkeypatch):
    """As on network file systems, and at 2 GiB on Linux."""
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 7), offset))
    assert FolderStore(folder).read("3.tar", 100, 500) == content(3)[100:600]


def test_no_more_files_are_open_than_wanted(folder):
    store = FolderStore(folder, max_open=3)
    for number in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 5]:
        assert store.read(f"{number}.tar", 0, 10) == content(number)[:10]
        assert sum(open_files(folder).values()) <= 3
    assert set(open_files(folder)) == {str(folder / f"{number}.tar") for number in (9, 0, 5)}


def test_the_file_that_was_not_read_for_longest_is_closed(folder):
    store = FolderStore(folder, max_open=2)
    for name in ("0.tar", "1.tar", "0.tar", "2.tar"):
        store.read(name, 0, 1)
    assert set(open_files(folder)) == {str(folder / "0.tar"), str(folder / "2.tar")}


def test_a_missing_shard_is_named(folder):
    with pytest.raises(
        BadShards, match=r"nowhere\.tar: 10 bytes at offset 0: the file is missing; restore it, or pack again"
    ):
        FolderStore(folder).read("nowhere.tar", 0, 10)


@pytest.mark.parametrize(("offset", "size", "missing"), [(990, 20, 10), (2000, 5, 5)])
def test_a_shard_that_was_cut_off_is_named_with_the_offset(offset, size, missing, folder):
    with pytest.raises(BadShards, match=rf"4\.tar: ends {missing} bytes before the sample at offset {offset} does"):
        FolderStore(folder).read("4.tar", offset, size)


def test_a_range_that_was_just_read_is_in_memory_and_one_behind_the_end_is_not(folder):
    store = FolderStore(folder)
    store.read("3.tar", 0, 1000)
    try:
        with (folder / "3.tar").open("rb") as file:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system cannot tell")
    assert store.in_memory("3.tar", 100, 900)
    assert not store.in_memory("3.tar", 100, 901)
    assert not store.in_memory("nowhere.tar", 0, 10)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_range_that_must_be_waited_for_is_not_in_memory(number, folder, monkeypatch):
    """Or one of a file system that cannot tell."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", refuse)
    assert not FolderStore(folder).in_memory("3.tar", 0, 10)


def test_nothing_is_in_memory_where_the_system_cannot_tell(folder, monkeypatch):
    monkeypatch.delattr(os, "RWF_NOWAIT")
    assert not FolderStore(folder).in_memory("3.tar", 0, 10)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_passes_is_tried_again_with_growing_pauses(number, folder, no_pauses, monkeypatch):
    calls = failing_pread(monkeypatch, times=2, number=number)
    assert FolderStore(folder).read("0.tar", 5, 10) == content(0)[5:15]
    assert len(calls) == 3
    assert len(no_pauses) == 2
    assert no_pauses[1] == 2 * no_pauses[0] > 0


def test_after_an_error_the_file_is_opened_anew(folder, no_pauses, monkeypatch):
    """A stale handle of a network file system never works again."""
    store = FolderStore(folder)
    store.read("0.tar", 0, 1)
    stale = store.files["0.tar"]
    failing_pread(monkeypatch, times=1, number=errno.ESTALE)
    store.read("0.tar", 0, 1)
    assert store.files["0.tar"] is not stale


def test_an_error_that_stays_ends_when_patience_does(folder, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.7)  # pauses of 0.2 and 0.4 seconds
    calls = failing_pread(monkeypatch, times=10**9)
    message = r"0\.tar: 10 bytes at offset 5: failed 3 times in 0\.7 s \(Input/output error\)"
    with pytest.raises(BadShards, match=message):
        FolderStore(folder).read("0.tar", 5, 10)
    assert len(calls) == 3


def test_an_error_that_cannot_pass_is_not_tried_again(folder, no_pauses, monkeypatch):
    calls = failing_pread(monkeypatch, times=10**9, number=errno.EACCES)
    with pytest.raises(BadShards, match=r"failed \(Permission denied\)"):
        FolderStore(folder).read("0.tar", 5, 10)
    assert len(calls) == 1
    assert not no_pauses


def test_many_threads_read_the_right_bytes_while_files_are_closed_under_them(folder):
    store = FolderStore(folder, max_open=2)
    start = threading.Barrier(8)

    def read_many(seed):
        rng = np.random.default_rng(seed)
        start.wait()
        for _ in range(300):
            number, offset, size = int(rng.integers(10)), int(rng.integers(900)), int(rng.integers(1, 100))
            assert store.read(f"{number}.tar", offset, size) == content_of[number][offset : offset + size]

    content_of = [content(number) for number in range(10)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_many, range(8)))
    assert sum(open_files(folder).values()) <= 2


# Every kind of store


@pytest.fixture(scope="module")
def s3():
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def gs():
    with gs_server() as url:
        yield url


@pytest.fixture(params=["folder", "s3", "gs"])
def store(request, tmp_path):
    """An empty one that can be written."""
    if request.param == "folder":
        return open_store(tmp_path / "store")
    return open_store(f"{request.getfixturevalue(request.param)}/{tmp_path.name}")


def put(store, name, content):
    with store.written(name) as file:
        file.write(content)


def test_what_was_written_is_read_whole_in_ranges_and_from_another_process_too(store):
    put(store, "deep/er/3.tar", content(3))
    for copy in (store, pickle.loads(pickle.dumps(store)), open_store(store.url)):
        assert copy.read_file("deep/er/3.tar") == content(3)
        for offset, size in [(0, 1000), (0, 1), (999, 1), (512, 300), (1000, 0)]:
            assert copy.read("deep/er/3.tar", offset, size) == content(3)[offset : offset + size]


def test_a_file_can_be_read_again_while_it_is_written_and_appears_when_it_is_whole(store):
    with store.written("file") as file:
        file.write(b"hello")
        file.seek(1)
        assert file.read(3) == b"ell"
        assert store.sizes(["file"]) == [None]
    assert store.read_file("file") == b"hello"
    with pytest.raises(ZeroDivisionError), store.written("file") as file:
        file.write(b"other" * (1 // 0))
    assert store.read_file("file") == b"hello"


def test_names_and_sizes_are_those_of_the_files_and_deleted_ones_are_gone(store):
    assert store.names() == []
    for name in ("b.tar", "a.tar", "below/c.json", "below/d.json"):
        put(store, name, name.encode())
    assert store.names() == ["a.tar", "b.tar", "below/c.json", "below/d.json"]
    assert store.names("below") == ["below/c.json", "below/d.json"]
    assert store.sizes(["b.tar", "nowhere", "below/c.json", "below"]) == [5, None, 12, None]
    many = ["a.tar", "nowhere", "b.tar"] * 50
    assert store.sizes(many) == [5, None, 5] * 50
    assert list(store.read_files(["b.tar", "below/d.json"] * 40)) == [b"b.tar", b"below/d.json"] * 40
    store.delete(["below/c.json", "below/d.json", "nowhere"])
    assert store.names() == ["a.tar", "b.tar"]


def test_what_is_not_there_or_too_short_is_named_with_the_offset(store):
    put(store, "4.tar", content(4))
    with pytest.raises(
        NoFile, match=r"nowhere\.tar: 5 bytes at offset 7: the file is missing; restore it, or pack again"
    ):
        store.read("nowhere.tar", 7, 5)
    for offset, size, missing in [(990, 20, 10), (2000, 5, 5)]:
        with pytest.raises(BadShards, match=rf"4\.tar: ends {missing} bytes before the sample at offset {offset} does"):
            store.read("4.tar", offset, size)


def test_many_threads_read_the_right_bytes_of_a_store(store):
    for number in range(4):
        put(store, f"{number}.tar", content(number))

    def read(seed):
        rng = np.random.default_rng(seed)
        number, offset, size = int(rng.integers(4)), int(rng.integers(900)), int(rng.integers(1, 100))
        return store.read(f"{number}.tar", offset, size) == content(number)[offset : offset + size]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(200)))


def test_a_bucket_that_is_not_there_is_said_so(s3):
    store = open_store("s3://nobody-made-this/data")
    with pytest.raises(BadShards, match=r"s3://nobody-made-this/data: there is no bucket 'nobody-made-this'"):
        put(store, "file", b"x")


def test_no_credentials_are_said_at_once_and_none_are_shown(s3, monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    S3FileSystem.clear_instance_cache()  # it remembers those of the other tests
    with pytest.raises(BadShards, match=r"s3://videos/data/file: failed \(NoCredentialsError: Unable to locate cred"):
        open_store("s3://videos/data").read_file("file")
    S3FileSystem.clear_instance_cache()


# A web server, with faults


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), hang_up, answer_short])
def test_a_store_that_fails_three_times_and_then_works_gives_the_right_bytes(fault, folder, no_pauses):
    with RangeServer(folder, fault=first(3, fault)) as server:
        assert open_store(server.url).read("3.tar", 100, 500) == content(3)[100:600]
        assert len(server.requests) >= 4
    assert len(no_pauses) == 3
    assert no_pauses == sorted(no_pauses)


@pytest.mark.parametrize(
    ("fault", "told"), [(status(500), "500"), (hang_up, ""), (answer_short, "11 of 10 bytes|more")]
)
def test_a_store_that_stays_broken_is_one_error_with_the_file_and_the_offset(fault, told, folder, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.7)
    with (
        RangeServer(folder, fault=first(10**9, fault)) as server,
        pytest.raises(BadShards, match=rf"{server.url}/3\.tar: 20 bytes at offset 5: failed 3 times in 0\.7 s"),
    ):
        open_store(server.url).read("3.tar", 5, 20)


def test_a_store_that_is_away_is_one_error(monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.3)
    with pytest.raises(
        BadShards, match=r"http://127\.0\.0\.1:9/3\.tar: 20 bytes at offset 5: failed 2 times in 0\.3 s"
    ):
        open_store("http://127.0.0.1:9").read("3.tar", 5, 20)


def test_a_store_that_does_not_answer_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(store_module.ObjectStore.run, "__kwdefaults__", {"seconds": 0.3})
    with (
        RangeServer(folder, delay_seconds=5) as server,
        pytest.raises(BadShards, match=r"3\.tar: 20 bytes at offset 5: failed \(TimeoutError\)"),
    ):
        open_store(server.url).read("3.tar", 5, 20)


@pytest.mark.parametrize("code", [401, 403, 410])
def test_a_refusal_is_not_asked_again(code, folder, no_pauses):
    with RangeServer(folder, fault=first(10**9, status(code))) as server:
        with pytest.raises(BadShards, match=rf"3\.tar: 20 bytes at offset 5: failed \(.*{code}"):
            open_store(server.url).read("3.tar", 5, 20)
        assert len(server.requests) == 1
    assert not no_pauses


def test_a_server_that_knows_no_ranges_is_refused_with_the_way_out(folder):
    with (
        RangeServer(folder, fault=first(10**9, ignore_range)) as server,
        pytest.raises(
            BadShards, match=r"1,000 bytes where 20 at offset 5 were asked for: .* not answer range requests"
        ),
    ):
        open_store(server.url).read("3.tar", 5, 20)


@pytest.mark.parametrize(("offset", "size", "missing"), [(990, 20, 10), (2000, 5, 5)])
def test_a_shard_on_a_web_server_that_was_cut_off_is_named_with_the_offset(offset, size, missing, folder):
    with (
        RangeServer(folder) as server,
        pytest.raises(BadShards, match=rf"4\.tar: ends {missing} bytes before .* {offset}"),
    ):
        open_store(server.url).read("4.tar", offset, size)


def test_a_web_server_cannot_be_written_to(folder):
    with (
        RangeServer(folder) as server,
        pytest.raises(BadShards, match=r"a web server cannot be written to; pack into a folder, s3:// or gs://"),
    ):
        put(open_store(server.url), "file", b"x")


# Places


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:curl http://x", r"pipe:\.\.\.: not a place for shards; expected a folder, or a URL that begins with"),
        ("ftp://host/x", "ftp:...: not a place"),
        ("file://host/x", "file:...: not a place"),
        ("s3::http://x/y", "s3:...: not a place"),
        ("s3:///x", r"s3:///x: expected s3://BUCKET/FOLDER"),
        ("s3://key:secret@bucket/x", r"^s3://bucket/x: the URL holds credentials, a query or a fragment \(not shown\)"),
        ("https://user:secret@host/x", r"^https://host/x: the URL holds credentials"),
        ("https://host/x?X-Amz-Signature=secret", r"^https://host/x: the URL holds credentials, a query"),
    ],
)
def test_what_is_no_place_is_refused_and_shows_no_secret(url, message):
    with pytest.raises(BadUrl, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_store_whose_package_is_missing_says_which(monkeypatch):
    monkeypatch.setattr(store_module, "find_spec", lambda name: None)
    with pytest.raises(BadUrl, match=r"gs://bucket/x: gcsfs is not installed; pip install 'grurcn\[gs\]'"):
        open_store("gs://bucket/x")


def test_a_place_means_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_url("data/mine") == absolute_url(Path("data/mine")) == str(tmp_path / "data/mine")
    assert absolute_url("file:///data/mine/") == "/data/mine"
    assert absolute_url("s3://bucket/mine/") == "s3://bucket/mine"
