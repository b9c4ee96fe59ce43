"""Names that settings of data take, and their check; importing this imports no library."""

from __future__ import annotations

import re
from typing import Any

from blip3o_dit.utils.json_files import short_repr
from blip3o_dit.utils.validation import is_number

# How tokens are stored: names of torch's dtypes.
DTYPE_NAMES = ("float16", "bfloat16", "float32")
# How the weights of blocks are quantised for generating (`model/quantization.py`).
QUANTIZATIONS = ("int8", "fp8")
# When checksums of a store are checked.
VERIFY_CHOICES = ("first", "never")
# How samples are held out, and how the others are ordered.
SPLIT_RULES = ("permutation", "key_hash", "group")
SHUFFLES = ("exact", "window")


def check_split(eval_split: Any, split_by: str, group_pattern: str = "") -> None:
    """Raises ValueError unless `eval_split` is a share below 1 or a count of samples, and the rule has what
    it needs.

    Hashes take shares only: with a count, a sample would change its side when data is appended.
    """
    known = is_number(eval_split) and 0 <= eval_split <= 2**53
    if not known or (eval_split >= 1 and eval_split != int(eval_split)):
        raise ValueError(
            "eval_split: expected a share in [0, 1) or a whole number of samples, "
            f"found {short_repr(eval_split)}"
        )
    if split_by != "permutation" and eval_split >= 1:
        raise ValueError(
            f"eval_split: expected a share in [0, 1) with split_by {split_by}, found {short_repr(eval_split)}"
        )
    _check_pattern(group_pattern, split_by)


def _check_pattern(pattern: str, split_by: str) -> None:
    if split_by != "group" and pattern:
        raise ValueError(f"group_pattern: expected split_by group beside it, found split_by {split_by}")
    if split_by == "group" and not pattern:
        raise ValueError(
            "group_pattern: expected with split_by group a regular expression that takes the group out of a "
            "key, such as '^(.*)_crop', found none"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"group_pattern: expected a regular expression, found {short_repr(pattern)}: {error}"
        ) from error
