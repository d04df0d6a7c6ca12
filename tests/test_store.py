"""Ranges of bytes of files: right, bounded in open files, patient with a network file system, and clear about what is missing."""

import errno
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shards import store as store_module
from shards.index import BadShards
from shards.store import ATTEMPTS, FolderStore


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
    monkeypatch.setattr(store_module.time, "sleep", pauses.append)
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
    with pytest.raises(BadShards, match=r"nowhere\.tar: the shard is missing; restore it, or pack again"):
        FolderStore(folder).read("nowhere.tar", 0, 10)


@pytest.mark.parametrize(("offset", "size", "missing"), [(990, 20, 10), (2000, 5, 5)])
def test_a_shard_that_was_cut_off_is_named_with_the_offset(offset, size, missing, folder):
    with pytest.raises(BadShards, match=rf"4\.tar: ends {missing} bytes before the sample at offset {offset} does"):
        FolderStore(folder).read("4.tar", offset, size)


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


def test_an_error_that_stays_ends_after_a_bounded_number_of_attempts(folder, no_pauses, monkeypatch):
    calls = failing_pread(monkeypatch, times=10**9)
    message = rf"0\.tar: 10 bytes at offset 5 cannot be read after {ATTEMPTS} attempts \(Input/output error\)"
    with pytest.raises(BadShards, match=message):
        FolderStore(folder).read("0.tar", 5, 10)
    assert len(calls) == ATTEMPTS
    assert len(no_pauses) == ATTEMPTS - 1


def test_an_error_that_cannot_pass_is_not_tried_again(folder, no_pauses, monkeypatch):
    calls = failing_pread(monkeypatch, times=10**9, number=errno.EACCES)
    with pytest.raises(BadShards, match=r"after 1 attempts \(Permission denied\)"):
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
