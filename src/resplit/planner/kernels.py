"""Compiles functions with numba, and keeps the compiled code for the next process where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from numba import njit

__all__ = ["kernel"]


def kernel(
    signatures: list[Any] | None = None, error_model: Literal["python", "numpy"] = "python"
) -> Callable[[Callable[..., Any]], Any]:
    """A decorator for a function that is compiled, at once if it has `signatures`, and runs without the lock of Python.

    Where numba finds no folder to write to, as for a user without a home who runs root's installation, the function is
    compiled anew in each process.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(signatures, cache=True, nogil=True, error_model=error_model)(function)
        except RuntimeError:
            return njit(signatures, nogil=True, error_model=error_model)(function)

    return compiled
