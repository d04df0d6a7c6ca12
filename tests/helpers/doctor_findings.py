"""Shared by the doctor's tests: findings in words, and machines that differ."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jobs.doctor.facts import MachineFacts
from jobs.doctor.findings import Finding

SECRET = "0123456789abcdef" * 4


def with_second(two: Sequence[MachineFacts], **facts: Any) -> list[MachineFacts]:
    """The second machine differs from the first in these facts."""
    return [two[0], replace(two[1], **facts)]


def bad(findings: Sequence[Finding]) -> Finding:
    """The only finding that is not ok."""
    [finding] = [finding for finding in findings if finding.level != "ok"]
    assert finding.fix
    return finding


def in_words(finding: Finding) -> str:
    return f"{finding.level} {finding.check}: {finding.text} -> {finding.fix}"
