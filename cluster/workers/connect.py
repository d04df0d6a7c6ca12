"""Finds the Ray cluster, or starts one on this machine."""

import logging
import os
import re
import socket

import ray
from ray.exceptions import RayError

from shards.store import error_line

CONNECT_SECONDS = 5.0
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a lost worker is seen at the controller's next look: 2 s by default
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a worker that does not answer at all: 10 minutes by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver watches (driver.py): Ray's would only wait
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class NoCluster(OSError):
    """Ray cannot be reached, or lacks what a job asks for."""


def start_ray() -> None:
    """Connects to the cluster that RAY_ADDRESS or a local `ray start` names; else starts Ray on this machine.

    Raises NoCluster if there is none at that address.
    """
    if ray.is_initialized():
        return
    check_address(os.environ.get("RAY_ADDRESS", ""))
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # That authentication is on is expected, and needs no message.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        # Without the dashboard, which nobody would look for: ten processes, and a third of the time to start.
        ray.init(log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
    except (ConnectionError, RuntimeError, RayError) as error:
        address = os.environ.get("RAY_ADDRESS", "this machine")
        raise NoCluster(
            f"no Ray cluster at {address} ({error_line(error)}); start one with: ray start --head, or unset RAY_ADDRESS"
        ) from None


def check_address(address: str) -> None:
    """Ray itself would try for a quarter of an hour to reach a cluster that is not there."""
    match = re.fullmatch(r"(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)", address)
    if match is None:
        return  # "auto", "local" or none: a cluster on this machine, if any
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise NoCluster(
            f"no Ray cluster at RAY_ADDRESS={address} ({error.strerror or error}); start one with: ray start --head, "
            "or unset RAY_ADDRESS to use this machine"
        ) from None
