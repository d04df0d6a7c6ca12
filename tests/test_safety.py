"""What must never happen: secrets in what a run leaves behind, strangers' code that runs, servers of ours that all can reach."""

import ast
import base64
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from s3fs import S3FileSystem
from safetensors.torch import save_file
from small_runs import OPTIONS

from cluster.checkpoints.run_folder import load_best
from cluster.tracking.server import NoTracking, tracking_uri
from grurcn.models.trunks.base import BadWeights
from grurcn.models.weights import read_weights
from grurcn.training.pretrained import read_pretrained
from jobs import train
from shards.store import BadUrl, open_store, retry

ROOT = Path(__file__).parents[1]
PACKAGES = ("grurcn", "cluster", "jobs", "shards")

# As they look: with characters that are written otherwise in URLs and in base64.
KEYS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzzSECRET01",
    "MLFLOW_TRACKING_PASSWORD": "a pass+word/of=mlflow 02",
    "MLFLOW_TRACKING_TOKEN": "eyJhbGciOi.mlflow-token.03",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyzSECRET04",
    "RAY_AUTH_TOKEN": "05fedcba98765432" * 4,
    "GOOGLE_API_KEY": "AIzaSyD-06-google_key",
}


# Secrets


def spellings(secret: str) -> Iterator[bytes]:
    """As it is, in a URL and in JSON; and in base64, at each of the three places that it may begin at."""
    yield secret.encode()
    yield quote(secret, safe="").encode()
    yield json.dumps(secret)[1:-1].encode()
    for shift in range(3):
        padded = base64.b64encode(b"x" * shift + secret.encode())
        inner = padded[4 if shift else 0 : len(padded) // 4 * 4 - 4]
        yield inner
        yield inner.replace(b"+", b"-").replace(b"/", b"_")


def leaks(content: bytes) -> list[str]:
    """The names of the keys that are in it."""
    return [name for name, secret in KEYS.items() if any(spelling in content for spelling in spellings(secret))]


def test_a_leak_would_be_seen():
    secret = KEYS["AWS_SECRET_ACCESS_KEY"]
    for written in (
        f"key={secret}!".encode(),
        quote(secret, safe="").encode(),
        *(base64.b64encode(f"{before}{secret} and more".encode()) for before in ("", "a", "ab", "user:")),
        base64.urlsafe_b64encode(f"x{secret}".encode()),
    ):
        assert leaks(written) == ["AWS_SECRET_ACCESS_KEY"], written
    assert not leaks(secret[:-1].encode() + bytes(range(256)))


def test_no_key_of_the_environment_is_in_anything_that_a_training_writes_or_says(shards, tmp_path):
    """The run's folder with its checkpoints, MLflow's database and artifacts, and all output."""
    storage = tmp_path / "storage"
    command = [
        sys.executable, "-m", "jobs.train", "demo", "--shards", str(shards), "--storage", str(storage), *OPTIONS,
        "--num-steps", "4", "--name", "run", "--json", str(storage / "result.json"), "--workers", "0",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **KEYS}, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [path for path in storage.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"mlflow.db", "run.json", "model.safetensors", "state.json", "recipe.json", "result.json"} <= names
    assert b"trained 4 steps" in done.stdout
    found = {path.name: leaks(path.read_bytes()) for path in files}
    assert not {name: keys for name, keys in found.items() if keys}
    assert not leaks(done.stdout + done.stderr)


@pytest.mark.parametrize("away", ["the store", "the tracker"])
def test_no_key_is_in_what_a_run_says_when_a_store_or_a_server_is_away(away, shards, tmp_path, monkeypatch, capfd):
    """Errors name places, never keys."""
    for name, value in {**KEYS, "AWS_ACCESS_KEY_ID": "AKIA0", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.1)
    if away == "the tracker":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    place = "s3://bucket/shards" if away == "the store" else str(shards)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(SystemExit) as ended:
        train.COMMAND.run(["demo", "--storage", str(tmp_path), "--shards", place])
    S3FileSystem.clear_instance_cache()
    said = "".join(capfd.readouterr())
    assert ended.value.code == 1
    assert re.search(r"error: .*127\.0\.0\.1:9", said), said
    assert not leaks(said.encode())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and leaks(path.read_bytes())]


@pytest.mark.parametrize(
    "uri", ["http://me:{}@mlflow.example:5000", "postgresql://me:{}@db.example/mlflow", "http://{}@host"]
)
def test_a_password_in_the_tracking_uri_is_refused_and_not_shown(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format("hunter2"))
    with pytest.raises((ValueError, NoTracking), match=r"holds credentials \(not shown\)") as refused:
        tracking_uri(tmp_path)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@127.0.0.1:9/vgg16.pth",
        "https://hunter2@127.0.0.1:9/vgg16.pth",
        "http://127.0.0.1:9/vgg16.pth?X-Amz-Signature=hunter2&X-Amz-Expires=60",
        "http://127.0.0.1:9/vgg16.pth?sig=hunter2",
    ],
)
@pytest.mark.parametrize("end", ["", f"#sha256={'0' * 64}"])
def test_credentials_in_the_url_of_weights_are_refused_and_not_shown(url, end):
    with pytest.raises(BadWeights, match=r"127\.0\.0\.1:9/vgg16\.pth.*holds credentials \(not shown\)") as refused:
        read_pretrained(url + end, "vgg16", "")
    assert "hunter2" not in str(refused.value)


# Code


# What our own source must not do, and where it does all the same: why that is safe.
FORBIDDEN = {
    "torch.load": "unpickles, unless weights_only=True",
    "pickle.load": "runs what a stranger wrote", "pickle.loads": "runs what a stranger wrote",
    "cloudpickle.load": "runs what a stranger wrote", "cloudpickle.loads": "runs what a stranger wrote",
    "marshal.loads": "runs what a stranger wrote", "shelve.open": "is pickle",
    "yaml.load": "makes any object", "yaml.unsafe_load": "makes any object",
    "numpy.load": "unpickles, unless allow_pickle=False", "np.load": "unpickles, unless allow_pickle=False",
    "eval": "runs text", "exec": "runs text", "__import__": "imports text",
    "os.system": "is a shell", "os.popen": "is a shell", "subprocess.getoutput": "is a shell",
    "urllib.request.urlretrieve": "downloads what nothing checks", "torch.hub.load": "downloads code",
    "torch.hub.load_state_dict_from_url": "downloads what eight digits check at most",
    "tempfile.mktemp": "is a race", "ssl._create_unverified_context": "believes any server",
    "urllib.request.urlopen": "reads from the network", "requests.get": "reads from the network",
}  # fmt: skip
EXCEPTIONS = {
    (
        "grurcn/models/weights.py",
        "urllib.request.urlopen",
    ): "checked by SHA-256 before the file has its name (test_weights)",
    (
        "cluster/tracking/server.py",
        "urllib.request.urlopen",
    ): "asks an MLflow server whether it is there; the answer is not used",
    (
        "jobs/doctor/tracking.py",
        "urllib.request.urlopen",
    ): "asks an MLflow server; of the answer the status alone is used",
}
SAFE_WITH = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "np.load": ("allow_pickle", False),
}
UNSAFE_ARGUMENTS = {
    "shell": True,
    "verify": False,
    "allow_pickle": True,
    "weights_only": False,
    "trust_remote_code": True,
}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml", "joblib"}


@cache
def sources() -> dict[str, ast.Module]:
    """All of our own, parsed, by path."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def dangers(path: str, source: str | ast.Module) -> list[tuple[str, str, str]]:
    """(file, what, file:line with why) of each call, argument and import that is forbidden."""
    found = []
    for node in ast.walk(ast.parse(source) if isinstance(source, str) else source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in FORBIDDEN_IMPORTS:
                    found.append((path, module, f"{path}:{node.lineno}: import {module}"))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {each.arg: each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
        for argument, value in UNSAFE_ARGUMENTS.items():
            if arguments.get(argument) is value:
                found.append((path, f"{argument}={value}", f"{path}:{node.lineno}: {name}(..., {argument}={value})"))
        if name in FORBIDDEN:
            argument, value = SAFE_WITH.get(name, ("", None))
            if not argument or arguments.get(argument) is not value:
                found.append((path, name, f"{path}:{node.lineno}: {name}: {FORBIDDEN[name]}"))
    return found


def test_no_source_of_ours_runs_what_it_reads_or_believes_what_it_downloads():
    assert len(sources()) > 50
    found = [each for path, tree in sources().items() for each in dangers(path, tree)]
    assert not [line for file, what, line in found if (file, what) not in EXCEPTIONS]
    unused = EXCEPTIONS.keys() - {(file, what) for file, what, _ in found}
    assert not unused, "exceptions that nothing needs any more"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "pickle.loads(data)",
        "import pickle",
        "from yaml import load",
        "subprocess.run('ls', shell=True)",
        "requests.post(url, verify=False)",
        "eval(text)",
        "urllib.request.urlopen(url)",
    ],
)
def test_a_line_that_must_not_be_is_found(line):
    assert [what for what in dangers("jobs/x.py", f"def f():\n    {line}\n") if "jobs/x.py:2" in what[2]]


@pytest.mark.parametrize(
    "line", ["torch.load(path, weights_only=True)", "np.load(f, allow_pickle=False)", "yaml.safe_load(f)"]
)
def test_a_line_that_may_be_is_not_found(line):
    assert not dangers("jobs/x.py", line)


class Trap:
    """Pickled, it makes a file wherever it is unpickled without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trace(tmp_path) -> Path:
    path = tmp_path / "it was run"
    pickle.loads(pickle.dumps(Trap(path)))
    assert path.exists()  # the trap works
    path.unlink()
    return path


def trapped(trace: Path) -> dict[str, bytes]:
    """Files that run code in a loader that unpickles: of torch, in the old and the new format, and a bare pickle."""
    files = {"pickle": pickle.dumps({"model": Trap(trace)})}
    for name, new in (("zip", True), ("old", False)):
        buffer = io.BytesIO()
        torch.save({"model": Trap(trace)}, buffer, _use_new_zipfile_serialization=new)
        files[name] = buffer.getvalue()
    return files


@pytest.mark.parametrize("kind", ["pickle", "zip", "old"])
def test_a_file_of_weights_with_code_in_it_is_refused_and_not_run(tmp_path, trace, kind):
    path = tmp_path / "weights.pth"
    path.write_bytes(trapped(trace)[kind])
    for read in (lambda: read_weights(str(path)), lambda: read_pretrained(str(path), "vgg16", "")):
        with pytest.raises(BadWeights, match=r"weights\.pth: not a PyTorch file of tensors"):
            read()
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip", "old"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_run_with_code_in_its_checkpoint_is_refused_and_not_run(tmp_path, trace, kind, file):
    """As someone would who can write into a run's folder, or who sends one."""
    folder = tmp_path / "run" / "checkpoint-00000001"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "state.json").write_text("{}")
    (folder / file).write_bytes(trapped(trace)[kind])
    (tmp_path / "run" / "run.json").write_text("{}")
    for place in (folder, tmp_path / "run"):
        with pytest.raises(ValueError, match=r"run|checkpoint|state"):
            load_best(place)
    assert not trace.exists()


# Servers and strangers' places


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """Each call of what ends with this name, and the file that it is in."""
    return [
        (path, node)
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name)
    ]


def test_the_servers_that_we_start_or_tell_people_to_start_listen_at_the_loopback():
    """Ray and MLflow do by themselves, unless they are told otherwise, which nothing here does."""
    assert not [path for path in sources() if "0.0.0.0" in (ROOT / path).read_text()]
    for name in ("ray.init", "Cluster"):
        assert calls(name), f"no call of {name} in our packages any more"
        for path, call in calls(name):
            for keyword in call.keywords:
                assert keyword.arg not in ("dashboard_host", "_node_ip_address"), f"{path}:{call.lineno}"
    from ray._private.parameter import RayParams

    assert RayParams().dashboard_host in ("127.0.0.1", "localhost")


def test_rays_own_cluster_and_mlflows_own_server_listen_at_the_loopback_by_default():
    from mlflow.cli import server
    from ray.scripts.scripts import start

    defaults = {
        option.name: option.default
        for command in (start, server)
        for option in command.params
        if "host" in str(option.name)
    }
    assert defaults["dashboard_host"] in ("127.0.0.1", "localhost")
    assert defaults["host"] in ("127.0.0.1", "localhost")


@pytest.mark.parametrize(
    "place",
    ["pipe:cat /etc/passwd", "pipe:touch it", "file:relative", "ftp://host/x", "simplecache::s3://bucket/x", "github://a:b@/x",
     "http:x", "data:,x", "gopher://h/x", "zip://x::http://h/y"],
)  # fmt: skip
def test_a_place_for_shards_or_runs_is_never_a_command_or_a_chain_of_file_systems(place):
    with pytest.raises(BadUrl, match="not a place for shards"):
        open_store(place)


def test_nothing_of_ours_reads_shards_by_webdatasets_own_opener_that_runs_commands():
    """WebDataset opens `pipe:` URLs and unpickles members unless WDS_SECURE is set: jobs.bench alone uses it, on its own tars."""
    users = {path for name in ("WebDataset", "gopen", "WebLoader") for path, _ in calls(name)}
    assert users <= {"jobs/bench/read.py"}
