"""Files of weights, good and bad, from a path and from a server of our own."""

import hashlib
import http.server
import pickle
import threading
import urllib.request
from pathlib import Path

import pytest
import torch

from grurcn.models import weights
from grurcn.models.trunks.base import BadWeights
from grurcn.models.weights import read_weights

TENSORS = {"features.0.weight": torch.arange(6.0).reshape(2, 3), "features.0.bias": torch.tensor([1, 2])}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.pth"
    torch.save(TENSORS, path)
    return path


def assert_are_the_tensors(found):
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].device.type == "cpu"


# Paths


def test_a_file_gives_back_its_tensors(good):
    assert_are_the_tensors(read_weights(str(good)))


def test_a_path_may_start_at_home(good, monkeypatch):
    monkeypatch.setenv("HOME", str(good.parent))
    assert_are_the_tensors(read_weights("~/good.pth"))


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(BadWeights, match=r"nowhere\.pth: no such file"):
        read_weights(str(tmp_path / "nowhere.pth"))


def test_a_folder_is_no_file_of_weights(tmp_path):
    with pytest.raises(BadWeights, match="no such file"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 half a zip", bytes(range(256))])
def test_a_file_that_torch_did_not_write_is_refused_by_name(tmp_path, content):
    path = tmp_path / "notes.pth"
    path.write_bytes(content)
    with pytest.raises(BadWeights, match=r"notes\.pth: not a PyTorch file of tensors \(.+\)"):
        read_weights(str(path))


def test_half_a_file_is_refused_by_name(good):
    good.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(BadWeights, match=r"good\.pth: not a PyTorch file of tensors"):
        read_weights(str(good))


class Trap:
    """Pickled, it writes a file wherever it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, save):
    path, trace = tmp_path / "trap.pth", tmp_path / "it was run"
    save({"features.0.weight": Trap(trace)}, path)
    with pytest.raises(BadWeights, match=r"trap\.pth: not a PyTorch file of tensors"):
        read_weights(str(path))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "kind"),
    [([torch.zeros(2)], "list"), (torch.zeros(2), "Tensor"), ({"state_dict": TENSORS, "epoch": 3}, "dict")],
)
def test_a_file_of_something_else_than_named_tensors_is_refused(tmp_path, content, kind):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(BadWeights, match=rf"other\.pth: holds a {kind}; expected a dictionary of named tensors"):
        read_weights(str(path))


# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path but /missing, and counts."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = b""
        self.requests = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        assert isinstance(server, Server)
        server.requests += 1
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/rubbish":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            # At /cut the connection ends early.
            self.wfile.write(server.content[: -10 if self.path == "/cut" else None])

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(good, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache" / "grurcn")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib remembers proxies from its first call on
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        server.content = good.read_bytes()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def cached():
    return [path.name for path in weights.CACHE.glob("*")]


def test_a_url_is_downloaded_once_and_then_read_from_the_cache(server):
    digest = sha256(server.content)
    source = f"{server.url}/models/vgg16.pth?download=1#sha256={digest}"
    assert_are_the_tensors(read_weights(source))
    assert_are_the_tensors(read_weights(source))
    assert server.requests == 1
    assert cached() == [f"{digest[:16]}-vgg16.pth"]


def test_a_new_file_at_the_same_url_is_downloaded(server, good):
    read_weights(f"{server.url}/vgg16.pth#sha256={sha256(server.content)}")
    torch.save({"other": torch.ones(1)}, good)
    server.content = good.read_bytes()
    assert list(read_weights(f"{server.url}/vgg16.pth#sha256={sha256(server.content)}")) == ["other"]
    assert len(cached()) == 2


def test_another_hash_is_refused_with_both_and_the_file_not_kept(server):
    expected, found = sha256(b"something else"), sha256(server.content)
    with pytest.raises(BadWeights, match=rf"/vgg16\.pth: SHA-256 {found}, expected {expected}; the file was not kept"):
        read_weights(f"{server.url}/vgg16.pth#sha256={expected}")
    assert cached() == []


@pytest.mark.parametrize("digits", [8, 9, 40])
def test_the_first_digits_of_the_sha256_are_enough(server, digits):
    digest = sha256(server.content)
    source = f"{server.url}/vgg16.pth#sha256={digest[:digits]}"
    assert_are_the_tensors(read_weights(source))
    assert_are_the_tensors(read_weights(source))
    assert server.requests == 1


@pytest.mark.parametrize("digits", [8, 9, 40])
def test_first_digits_of_another_hash_are_refused(server, digits):
    found = sha256(server.content)
    expected = found[: digits - 1] + "0123456789abcdef"[int(found[digits - 1], 16) - 1]  # all but the last are right
    with pytest.raises(BadWeights, match=rf"/vgg16\.pth: SHA-256 {found}, expected {expected}; the file was not kept"):
        read_weights(f"{server.url}/vgg16.pth#sha256={expected}")
    assert cached() == []


def test_a_file_in_the_cache_that_is_not_the_expected_one_is_refused(server):
    digest = sha256(server.content)
    source = f"{server.url}/vgg16.pth#sha256={digest}"
    read_weights(source)
    other = digest[:-1] + "0123456789abcdef"[int(digest[-1], 16) - 1]
    with pytest.raises(BadWeights, match=rf"-vgg16\.pth: SHA-256 {digest}, expected {other}; delete it"):
        read_weights(f"{server.url}/vgg16.pth#sha256={other}")
    [path] = weights.CACHE.iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(BadWeights, match=rf"-vgg16\.pth: SHA-256 .*, expected {digest}; delete it"):
        read_weights(source)
    path.unlink()
    assert_are_the_tensors(read_weights(source))
    assert server.requests == 2


def test_a_file_that_was_put_into_the_cache_by_hand_is_taken(server, good):
    source = f"{server.url}/missing#sha256={sha256(server.content)[:8]}"
    with pytest.raises(BadWeights, match="or put it at") as refused:
        read_weights(source)
    path = Path(str(refused.value).split("put it at ")[1])
    good.rename(path)
    assert_are_the_tensors(read_weights(source))


def test_a_download_that_ends_early_is_refused_and_not_kept(server):
    with pytest.raises(BadWeights, match=r"/cut: SHA-256 .*expected"):
        read_weights(f"{server.url}/cut#sha256={sha256(server.content)}")
    assert cached() == []


@pytest.mark.parametrize(("path", "reason"), [("missing", "Not Found"), ("rubbish", "this is no HTTP")])
def test_an_answer_without_a_file_is_refused_with_the_reason(server, path, reason):
    with pytest.raises(BadWeights, match=rf"/{path}: cannot be downloaded \({reason}\); fetch it elsewhere"):
        read_weights(f"{server.url}/{path}#sha256={'0' * 64}")
    assert cached() == []


def test_a_server_that_is_away_is_named_with_the_reason(server):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(BadWeights, match=rf"{url}/vgg16\.pth: cannot be downloaded \(.*refused\); fetch it elsewhere"):
        read_weights(f"{url}/vgg16.pth#sha256={'0' * 64}")


@pytest.mark.parametrize(
    "end",
    ["", "#", "#sha256=", "#sha256=1234abc", f"#sha256={'0' * 65}", f"#md5={'0' * 64}", f"#sha256={'x' * 64}"],
)
def test_a_url_without_its_sha256_is_refused_before_anything_is_downloaded(server, end):
    with pytest.raises(BadWeights, match=r"/vgg16\.pth.*: a download must name its SHA-256: URL#sha256="):
        read_weights(f"{server.url}/vgg16.pth{end}")
    assert server.requests == 0
