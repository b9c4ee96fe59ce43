"""The mark of what overrides a private method of the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import Trainer

Method = TypeVar("Method", bound=Callable[..., Any])


def overrides_trainer(method: Method) -> Method:
    """Marks an override of a method that is none of the Trainer's documented ones.

    One that the installed Trainer does not have is an ImportError: overriding it would do nothing.

    Raises:
        ImportError: when the installed Trainer has no such method, and overriding it would do nothing.
    """
    if not callable(getattr(Trainer, method.__name__, None)):
        raise ImportError(f"transformers: expected a Trainer with the method {method.__name__}, found none")
    return method
