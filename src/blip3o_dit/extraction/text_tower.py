"""CLIP's text tower: one vector for the name of each class, in the space of its pooled picture vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from blip3o_dit.extraction.vision_towers import NOT_LOADED, find_folder
from blip3o_dit.extraction.weight_files import weight_files
from blip3o_dit.utils.json_files import one_line
from blip3o_dit.utils.logging import quiet_transformers

TEMPLATE = "a photo of a {}"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@torch.no_grad()
def class_vectors(
    names: Sequence[str], clip: str, *, template: str = TEMPLATE, device: str | torch.device = "cpu"
) -> Tensor:
    """The text "a photo of a NAME" of each class as a vector of length 1, [K, projection_dim], on the CPU.

    Zero-shot classification as CLIP does it (Radford et al., arXiv 2103.00020, section 3.1).

    Args:
        clip: folder or owner/name on the hub of a whole CLIP, with its tokenizer.

    Raises:
        FileNotFoundError, ValueError: one line: nothing there, no text tower, no tokenizer.
    """
    folder, _ = find_folder(clip, None, more=["merges.txt", "vocab.json"])
    weight_files(folder)  # looked at before they are loaded
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder}: expected a tokenizer beside the text tower, found none")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            found: Any = CLIPTextModelWithProjection.from_pretrained(
                folder, output_loading_info=True, local_files_only=True
            )
            model, info = found
    except NOT_LOADED as error:
        raise ValueError(f"{folder}: not a CLIP with a text tower: {one_line(error)}") from error
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ValueError(f"{folder}: expected the weights of a text tower, found {len(missing)} missing")
    texts = [template.format(name) for name in names]
    words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
    return F.normalize(model.to(device).eval()(**words).text_embeds.float(), dim=-1).cpu()


def read_class_names(path: Path) -> list[str]:
    """The lines of a file, one class each, without those that are empty.

    Raises:
        FileNotFoundError, ValueError: one line: no such file, no text, fewer than two classes, one twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected lines of text in UTF-8, found other bytes") from error
    names = [line for line in lines if line]
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError(f"{path}: expected two or more classes, each once, found {len(names)} lines")
    return names
