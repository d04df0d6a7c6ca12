"""Pointwise functions, each compiled to one kernel on a GPU."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles the function to one kernel at its first call on a GPU. Elsewhere it runs uncompiled, with the same results.

    A machine that cannot compile (no C compiler, no Triton) warns once, and runs the function uncompiled.
    """
    compiled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*maps: P.args, **others: P.kwargs) -> R:
        nonlocal compiled
        if not (isinstance(maps[0], Tensor) and maps[0].is_cuda):
            return function(*maps, **others)
        if compiled is None:
            compiled = torch.compile(function, dynamic=True) if can_compile() else function
        return compiled(*maps, **others)

    return call


@functools.cache
def can_compile() -> bool:
    try:
        torch.compile(torch.sigmoid, dynamic=True)(torch.zeros(2, device="cuda"))
    except Exception as error:  # whatever a machine lacks for it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"torch.compile does not work here ({reason}); pointwise functions run unfused", stacklevel=2)
        return False
    return True
