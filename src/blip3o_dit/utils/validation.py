"""Checks of values that users give: ValueError with one line, what was expected and what was found."""

from __future__ import annotations

import importlib.util
import math
import operator
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from blip3o_dit.utils.json_files import one_line, short_repr, show_names
from blip3o_dit.utils.recognise import instead_of

if TYPE_CHECKING:
    import torch

# No size of a network, and no number of steps, reaches this; the products of such sizes fit 64 bits.
MAX_SIZE = 2**20


def check_bool(field_name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{field_name}: expected true or false, found {short_repr(value)}")


def check_text(field_name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{field_name}: expected text, found {short_repr(value)}")


def check_name(field_name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises ValueError, listing the known names, unless `value` is one of them."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{field_name}: expected one of {known}, found {short_repr(value)}")


def check_known(where: Any, names: Iterable[str], known: list[str]) -> None:
    """Raises ValueError, listing the known names, when there are others."""
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f"{where}: unknown {show_names(unknown)}; known are {known}")


def check_range(field_name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a number in [low, high)."""
    if not is_number(value) or not low <= value < high:
        raise ValueError(f"{field_name}: expected a number in [{low}, {high}), found {short_repr(value)}")


def check_integer(field_name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{field_name}: expected an integer >= {low}, found {short_repr(value)}")
    if value >= 2**53:
        raise ValueError(f"{field_name}: expected an integer below 2^53, found {short_repr(value)}")


def check_size(field_name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field_name}: expected a positive integer, found {short_repr(value)}")
    if value > MAX_SIZE:
        raise ValueError(f"{field_name}: expected at most {MAX_SIZE}, found {short_repr(value)}")


def is_number(value: Any) -> bool:
    """An int or a float that every float can stand for; JSON's integers have no end."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, float)


def checked_integer(field_name: str, value: Any, *, low: int | None = None) -> int:
    """The value as an int: Python's, NumPy's or a tensor's. Raises ValueError for others, or below `low`."""
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or isinstance(value, bool) or (low is not None and number < low):
        wanted = "an integer" if low is None else f"an integer >= {low}"
        raise ValueError(f"{field_name}: expected {wanted}, found {short_repr(value)}")
    return number


def checked_integers(field_name: str, values: Any, count: int) -> list[int]:
    """So many of them. Raises ValueError."""
    try:
        found = list(values)
    except TypeError:
        found = [values]
    if len(found) != count:
        raise ValueError(f"{field_name}: expected {count} entries, found {len(found)}")
    return [checked_integer(field_name, value) for value in found]


def check_finite_number(field_name: str, value: Any) -> None:
    if not _is_real(value) or not math.isfinite(value):
        raise ValueError(f"{field_name}: expected a finite number, found {short_repr(value)}")


def check_interval(field_name: str, value: Any) -> tuple[float, float]:
    """(low, high) within [0, 1]. Raises ValueError for anything else."""
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(map(_is_real, pair)) or not 0.0 <= pair[0] < pair[1] <= 1.0:
        raise ValueError(f"{field_name}: expected 0 <= low < high <= 1, found {short_repr(value)}")
    return pair


def _is_real(value: Any) -> bool:
    """As `is_number`, or one of NumPy's numbers."""
    return is_number(value) or (isinstance(value, Real) and not isinstance(value, int))


@contextmanager
def error_context(file: Path) -> Iterator[None]:
    """A ValueError about a value says which file the value is from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@contextmanager
def damage_refused(file: Path, what: str = "weights") -> Iterator[None]:
    """A safetensors file that cannot be read is a ValueError of one line."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        found = instead_of(file) if file.is_file() else ""
        said = f"found no safetensors file{found}" if found else one_line(error)
        raise ValueError(f"{file}: not readable {what}: {said}") from error


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether the user named a hub repository (`model` or `owner/model`) rather than a folder.

    A path object never is one, nor a name whose folder, or whose parent folder, is there: a mistyped
    folder must not become a request to somebody else's server.
    """
    if not isinstance(name, str) or name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
        return False
    return not Path(name).exists() and not ("/" in name and Path(name).parent.exists())


def package_missing(wanted_by: str, package: str) -> ValueError:
    """The error for an optional package that is not there; `package` is its name on the package index."""
    return ValueError(f"{wanted_by}: expected the package {package}, found none: pip install {package}")


@cache
def triton_works() -> bool:
    """Whether Triton is there, and a C compiler for what launches its kernels."""
    compilers = (os.environ.get("CC", "gcc"), "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


def check_compiler(wanted_by: str, device: torch.device) -> None:
    """Refuse (ValueError) what torch.compile cannot do here: it writes C++ for a CPU, Triton for a GPU."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise ValueError(f"{wanted_by}: expected a C++ compiler (g++ or clang++), found none")
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise ValueError(f"{wanted_by}: expected triton, which comes with torch's CUDA builds, found none")
