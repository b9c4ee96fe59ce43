"""The folder of a decoder: written whole or not at all, and checked when it is read.

config.json          kind, sizes, and under "training" its settings and what was measured of it
model.safetensors    weights, the statistics of the tokens, and the mean picture
checksums.json       of these, written last
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from blip3o_dit.data.store_folder import IGNORED
from blip3o_dit.decoder.config import DecoderConfig
from blip3o_dit.decoder.network import TokenDecoder
from blip3o_dit.model.loading import WEIGHTS_FILE, compare_shapes, finish_model, refuse_misfits
from blip3o_dit.utils.atomic import save_tensors, write_atomically, written_aside
from blip3o_dit.utils.checksums import is_sealed, verify
from blip3o_dit.utils.hub import model_folder
from blip3o_dit.utils.json_files import printable, read_json_object, short_repr
from blip3o_dit.utils.recognise import DECODER, DECODER_TYPE, recognise, refusal
from blip3o_dit.utils.validation import check_known, damage_refused, error_context, is_number

CONFIG_FILE = "config.json"
NOTED = ("model_type", "training")


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse (ValueError) a place that holds something else than nothing, or a decoder to be replaced."""
    if not folder.exists():
        return
    if folder.is_dir() and not {file.name for file in folder.iterdir()} - IGNORED:
        return
    found = recognise(folder)
    if found.kind != "decoder":
        raise ValueError(f"{folder}: expected a new folder for a decoder, found {found.what}")
    if not overwrite:
        raise ValueError(f"{folder}: expected a new folder, found a decoder (overwrite=True replaces it)")


def save_decoder(decoder: TokenDecoder, folder: Path) -> None:
    """Write a decoder; one that is there is replaced when the new one is whole.

    Raises:
        WriteError: when the disk is full or the folder cannot be written.
    """
    content = {"model_type": DECODER_TYPE, **asdict(decoder.config), "training": decoder.about}
    with written_aside(folder, files_only=True) as aside:
        save_tensors(decoder.state_dict(), aside / WEIGHTS_FILE)
        write_atomically(aside / CONFIG_FILE, json.dumps(content, indent=2).encode())


def load_decoder(folder: str | Path, device: torch.device | str = "cpu") -> TokenDecoder:
    """The decoder in a folder, for decoding; or `owner/name` on the hub, or an address, fetched.

    Raises:
        FileNotFoundError, ValueError: one line: no decoder there, files that were altered, or weights that do
            not fit the configuration.
    """
    folder = model_folder(folder, weights="raw")
    if recognise(folder).kind != "decoder":
        finish_model(folder)  # a process that replaced it may have been killed
        if recognise(folder).kind != "decoder":
            raise refusal(folder, DECODER)
    if is_sealed(folder):
        verify(folder, [CONFIG_FILE, WEIGHTS_FILE])
    config, about = _read_config(folder / CONFIG_FILE)
    with torch.device("meta"):
        decoder = TokenDecoder(config)
    file = folder / WEIGHTS_FILE
    with damage_refused(file), safe_open(file, framework="pt") as tensors:
        found = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        expected = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
        refuse_misfits(str(file), **compare_shapes(expected, found))
        state = {name: tensors.get_tensor(name).float() for name in expected}
    decoder.load_state_dict(state, assign=True)
    decoder.about = about
    return decoder.eval().to(device)


def describe_decoder(folder: Path) -> dict[str, Any]:
    """What is known of the decoder in a folder, as JSON values, without its weights.

    Raises:
        ValueError: one line: a file of it that cannot be read.
    """
    config, about = _read_config(folder / CONFIG_FILE)
    return {"path": str(folder), "kind": recognise(folder).what, "sizes": asdict(config), "training": about}


def format_decoder(about: dict[str, Any]) -> str:
    """The same as text."""
    sizes, training = about["sizes"], about["training"]
    lines = [
        f"{printable(about['path'])}: {about['kind']}",
        f"  takes        {sizes['num_tokens']} tokens, {sizes['channels']} wide"
        + (", L2-normalised first" if sizes["normalize_embeddings"] else ""),
        f"  makes        pictures of {sizes['picture_size']} pixels a side",
        f"  network      width {sizes['width']}, layers {sizes['num_layers']}, heads {sizes['num_heads']}",
    ]
    if "embeddings" in training:
        samples = f"{short_repr(training.get('train_samples'))} samples"
        lines.append(f"  data         {printable(str(training['embeddings']))}, {samples}")
    held_out = training.get("held_out")
    for method, found in held_out.items() if isinstance(held_out, dict) else ():
        figures = [f"{name} {value:.4g}" for name, value in dict(found).items() if is_number(value)]
        lines.append(f"  held out     {printable(method)}: {', '.join(figures)}")
    return "\n".join(lines) + "\n"


def _read_config(file: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    content = read_json_object(file)
    names = [option.name for option in fields(DecoderConfig)]
    with error_context(file):
        check_known("settings", content, [*NOTED, *names])
        missing = set(names) - {"normalize_embeddings"} - set(content)
        if missing:
            raise ValueError(f"expected {sorted(missing)}, found none")
        about = content.get("training", {})
        if not isinstance(about, dict):
            raise ValueError(f"training: expected an object, found {type(about).__name__}")
        return DecoderConfig(**{name: content[name] for name in names if name in content}), about
