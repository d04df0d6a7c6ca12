"""What made a run: the command, the commit and what was changed since, packages; and no secret among it."""

import subprocess
from pathlib import Path

import pytest

from cluster.tracking.provenance import command, environment, git_commit, git_diff, masked, provenance_tags

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.delenv("GRURCN_COMMIT", raising=False)
    for words in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "a.py").write_text("print(1)\n")
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "commit", "-qm", "first"], check=True)
    return tmp_path


def test_a_clean_clone_has_a_commit_and_no_changes(clone):
    assert len(git_commit(clone)) == 40
    assert git_diff(clone) is None


def test_changes_and_new_files_are_told_and_secrets_in_them_are_not(clone, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (clone / "a.py").write_text(f"print(2)  # {SECRET}\n")
    (clone / "new.py").write_text("")
    assert git_commit(clone).endswith("+changes")
    diff = git_diff(clone) or ""
    assert "# not in git: new.py" in diff
    assert "+print(2)  # ***" in diff
    assert SECRET not in diff


def test_a_folder_that_is_no_clone_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("GRURCN_COMMIT", raising=False)
    assert git_commit(tmp_path) == "unknown"
    assert git_diff(tmp_path) is None
    monkeypatch.setenv("GRURCN_COMMIT", "abc")
    assert git_commit(tmp_path) == "abc"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"--key {SECRET}", "--key ***"),
        ("https://me:pass@host/x?y=1", "https://***@host/x?y=1"),
        ("postgresql://user@host/db", "postgresql://***@host/db"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("a@b.org wrote --name x", "a@b.org wrote --name x"),
    ],
)
def test_values_of_secrets_and_credentials_in_urls_are_masked(monkeypatch, text, wanted):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert masked(text) == wanted


def test_short_values_and_other_variables_are_left_alone(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "on")
    monkeypatch.setenv("HOME_OF_ALL", "a-long-value")
    assert masked("turned on: a-long-value") == "turned on: a-long-value"


def test_the_environment_is_lines_that_pip_understands():
    lines = environment().splitlines()
    assert lines[0].startswith("# Python 3.")
    packages = [line for line in lines if line and not line.startswith("#")]
    assert any(line.startswith("torch==") for line in packages)
    assert all(line.count("==") == 1 for line in packages)
    assert packages == sorted(packages, key=str.lower)


def test_a_runs_tags_are_those_that_mlflows_pages_show(clone):
    tags = provenance_tags(clone)
    assert tags["mlflow.source.git.commit"] == tags["git_commit"]
    assert command().startswith(tags["mlflow.source.name"])
    assert tags["mlflow.user"]
