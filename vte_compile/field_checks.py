"""Checks that the parts of a plan share; every message starts with the name of the field."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor

from vte_compile.errors import PlanError

_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def located(where: str, separator: str) -> Iterator[None]:
    """Put `where` in front of the messages of plan errors, which start with a field's name."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{where}{separator}{error}") from error


def integer(name: str, value: object, minimum: int) -> int:
    """`value` as a plain int (numpy integers are welcome, booleans are not)."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise PlanError(f"{name}: expected an integer, got {type(value).__name__}")
    if number < minimum:
        raise PlanError(f"{name}: must be {minimum} or more, got {number}")
    return number


def finite(name: str, value: object) -> float:
    """`value` as a finite float (any real number but booleans is welcome)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PlanError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an integer
        number = math.inf
    if not math.isfinite(number):
        raise PlanError(f"{name}: must be finite, got {number}")
    return number


def float_tensor(name: str, value: object, ndim: int) -> Tensor:
    """`value`, detached, if it is a floating-point tensor of `ndim` dimensions; its values are not looked at."""
    if not isinstance(value, Tensor):
        raise PlanError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in _WEIGHT_DTYPES:
        raise PlanError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.ndim != ndim:
        raise PlanError(f"{name}: expected {ndim} dimension{'s' if ndim > 1 else ''}, got shape {list(value.shape)}")
    if value.is_meta:
        raise PlanError(f"{name}: has no values (it is on the meta device)")
    return value.detach()


def check_pair(name: str, value: Tensor, shape: list[int], other_name: str, other: Tensor) -> None:
    """Make sure that `value` has `shape`, and the dtype and device of `other`, which it goes with."""
    if list(value.shape) != shape:
        raise PlanError(f"{name}: expected shape {shape} to go with {other_name}, got {list(value.shape)}")
    if (value.dtype, value.device) != (other.dtype, other.device):
        raise PlanError(
            f"{name}: {value.dtype} on {value.device} does not go with {other_name}: {other.dtype} on {other.device}"
        )


def check_values(name: str, value: Tensor) -> None:
    """Make sure that all values are finite."""
    if not bool(torch.isfinite(value).all()):
        raise PlanError(f"{name}: holds NaN or infinite values")
