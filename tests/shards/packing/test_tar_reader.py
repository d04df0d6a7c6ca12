"""Members lie where the standard library finds them, and headers that lie are refused."""

import hashlib
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from external_tars import header, link, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from shards.packing.tar_reader import BadTar, TarReader, key_and_suffix
from shards.store import FolderStore


def members_of(folder: Path, name: str) -> list[tuple[str, str, int, int]]:
    path = folder / name
    with closing(TarReader(FolderStore(folder), name, path.stat().st_size)) as shard:
        found = []
        while (member := shard.next_member()) is not None:
            found.append((member.name, member.kind, member.offset, member.size_bytes))
            shard.skip_to(min(member.end, shard.size_bytes))
        assert shard.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    return found


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=120)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(
        st.tuples(st.lists(NAMES, min_size=1, max_size=4).map("/".join), st.integers(0, 1500)), max_size=6
    ),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_lie_where_the_standard_library_finds_them(tmp_path_factory, members, kind):
    folder = tmp_path_factory.mktemp("tar")
    path = write_tar(folder / "t.tar", *((name, bytes(size)) for name, size in members), format=kind)
    with tarfile.open(path) as tar:
        wanted = [(info.name, "file", info.offset_data, info.size) for info in tar]
    assert members_of(folder, "t.tar") == wanted


def test_members_of_other_kinds_and_odd_headers_are_walked_over(tmp_path):
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        odd = tarfile.TarInfo("unknown")
        odd.type, odd.size = b"Z", 700
        members = [
            ("d" * 90 + "/" + "n" * 90, b"x" * 600),
            link("soft", tarfile.SYMTYPE, "t" * 90), link("hard", tarfile.LNKTYPE), link("folder/", tarfile.DIRTYPE),
            link("device", tarfile.BLKTYPE), ("after", b"y"),
        ]  # fmt: skip
        path = write_tar(tmp_path / f"{kind}.tar", *members, format=kind, pax_headers={"comment": "c" * 600})
        with tarfile.open(path) as tar:
            wanted = [(info.name, info.offset_data, info.size) for info in tar]
        found = members_of(tmp_path, path.name)
        assert [(name, offset, size) for name, _, offset, size in found] == wanted
        assert [member[1] for member in found] == ["file", "link", "link", "folder", "special file", "file"]


def pax(*records: bytes) -> bytes:
    content = b"".join(records)
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def extension(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (extension(tarfile.GNUTYPE_LONGNAME, 2**40), "claims a name or fields of 1099511627776 bytes"),
        (extension(tarfile.XHDTYPE, 2**21) + bytes(2**21), "claims a name or fields of 2097152 bytes"),
        (header("a.mp4", -5), "claims -5 bytes"),
        (pax(b"18 size=-99999999\n") + header("a.mp4", 5), "claims '-99999999' bytes"),
        (pax(b"9999 path=a\n") + header("a.mp4", 5), "the extended header at offset 0 is damaged"),
        (pax(b"0 path=a\n") + header("a.mp4", 5), "the extended header at offset 0 is damaged"),
        (pax(b"nonsense") + header("a.mp4", 5), "the extended header at offset 0 is damaged"),
        (pax(b"22 GNU.sparse.major=1\n") + header("a.mp4", 5), "a sparse file"),
        (extension(tarfile.GNUTYPE_SPARSE, 0), "a sparse file"),
    ],
)
def test_headers_that_lie_are_refused(content, message, tmp_path):
    (tmp_path / "t.tar").write_bytes(content + bytes(1024))
    with pytest.raises(BadTar, match=message):
        members_of(tmp_path, "t.tar")


@given(st.text(st.sampled_from("ab./_"), min_size=1, max_size=12))
def test_keys_are_those_of_webdataset_but_for_hidden_files(name):
    key, suffix = key_and_suffix(name)
    if key:
        assert (key, suffix) == base_plus_ext(name)
    else:
        file = name.rpartition("/")[2]
        assert file.startswith(".") or "." not in file or name.startswith("__")
