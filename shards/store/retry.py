"""Retries: what fails for a moment is tried again, with growing pauses, until PATIENCE_SECONDS have passed."""

import asyncio
import errno
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from shards.store.errors import BadShards, NoFile, is_disk_full

T = TypeVar("T")

PATIENCE_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.2  # doubled after each attempt
LONGEST_PAUSE_SECONDS = 5.0
TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ENETUNREACH})
NO_ACCESS = re.compile(r"NoCredentials|PartialCredentials|ParamValidation|NoSuchBucket|InvalidURL|ProfileNotFound")


def retried(
    action: Callable[[], T],
    what: str,
    is_transient: Callable[[Exception], bool],
    before_retry: Callable[[], None] = lambda: None,
) -> T:
    """action(), retried while its error is transient, for PATIENCE_SECONDS at most.

    Raises NoFile or BadShards that says what was tried, how often, and the last error. Errors of our own, of memory and of
    a full disk are raised as they are.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    attempts, pause = 0, FIRST_PAUSE_SECONDS
    while True:
        attempts += 1
        try:
            return action()
        except (BadShards, MemoryError):
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise NoFile(f"{what}: the file is missing; restore it, or pack again") from None
        except Exception as error:
            if is_our_bug(error) or is_disk_full(error):
                raise
            if not is_transient(error) or time.monotonic() + pause > until:
                times = "" if attempts == 1 else f" {attempts} times in {PATIENCE_SECONDS:g} s"
                raise BadShards(f"{what}: failed{times} ({in_one_line(error)})") from None
            logging.getLogger(__name__).info("%s: %s; trying again in %.1f s", what, in_one_line(error), pause)
        before_retry()
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def is_transient_of_disk(error: Exception) -> bool:
    """Whether an error of a disk or a network file system may pass."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def is_transient_of_server(error: Exception) -> bool:
    """Whether an error of a request may pass: not without permission or credentials, nor with statuses 400 to 499."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    return not isinstance(error, PermissionError) and not NO_ACCESS.search(type(error).__name__)


def is_our_bug(error: Exception) -> bool:
    return isinstance(error, (TypeError, AttributeError, NameError, NotImplementedError, AssertionError, KeyError))


def in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, (asyncio.TimeoutError, ConnectionError)):
        return error.strerror
    lines = str(error).strip().splitlines()
    name = re.sub(r"^FSTimeoutError$", "TimeoutError", type(error).__name__)
    return f"{name}: {lines[0]}" if lines else name
