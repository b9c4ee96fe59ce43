"""Predicted tokens as pictures: what a decoder makes of each sampler's, beside what it makes of the truth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.decoder.decode import check_fits
from blip3o_dit.decoder.network import TokenDecoder
from blip3o_dit.decoder.pictures import quality
from blip3o_dit.evaluation.reference import ReferenceSet
from blip3o_dit.evaluation.samplers import Sampler
from blip3o_dit.evaluation.summary import count, listed
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.metrics.bootstrap import Bootstrap
from blip3o_dit.training.config import SPLIT_SETTINGS, TRAINING_CONFIG_FILE, TrainingConfig
from blip3o_dit.utils.json_files import escaped
from blip3o_dit.utils.stateless_random import stateless_choice

# Most held-out samples whose decoded pictures are measured
MOST_DECODED = 64
FIGURES = ("psnr", "l1")
# Baselines that the sentence names
SAID = ("ridge", "position mean")

logger = logging.getLogger(__name__)


def check_decoder(decoder: TokenDecoder, loaded: Sequence[BLIP3oInference], source: Embeddings) -> None:
    """Refuse (ValueError) a decoder that does not take the models' tokens; warn if it may know samples."""
    check_fits(decoder, source.num_tokens, source.target_dim, source.path)
    check_made_for(decoder, loaded[0])


def check_made_for(decoder: TokenDecoder, first: BLIP3oInference) -> None:
    """Refuse (ValueError) a decoder of tokens that are normalised otherwise; warn if it may know samples."""
    if first.model.config.normalize_embeddings and not decoder.config.normalize_embeddings:
        raise ValueError(
            f"decoder: expected one for the L2-normalised tokens of {first.model_path} (train-decoder "
            "--normalize_embeddings), found one for tokens as they are stored"
        )
    known = decoder.about.get("settings", {})
    if (first.model_path / TRAINING_CONFIG_FILE).is_file():
        run = TrainingConfig.from_folder(first.model_path)
        other = [name for name in SPLIT_SETTINGS if known.get(name) != getattr(run, name)]
        if other:
            logger.warning(
                "the decoder was trained on another split (%s) than the model: it may have seen pictures "
                "that are held out here",
                ", ".join(f"{name} {known.get(name)}, not {getattr(run, name)}" for name in other),
            )


def measure_decoded(
    decoder: TokenDecoder,
    samplers: Sequence[Sampler],
    reference: ReferenceSet,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
) -> dict[str, Any]:
    """Decoded samples against decoded true tokens, of at most `MOST_DECODED` held-out samples.

    Returns: the entry `decoded` of metrics.json, see docs/evaluation.md.
    """
    config = reference.config
    available = len(reference.indices)
    indices = reference.indices[stateless_choice(available, MOST_DECODED, seed=config.seed, stream="decoded")]
    eva, clip = reference.source.fetch(indices)
    true = decoder.decode(clip)
    bootstrap = Bootstrap(len(indices), config.bootstrap, config.seed)
    methods: dict[str, dict[str, Any]] = {}
    for sampler in progress(samplers, "decoding"):
        parts = [
            (sampler.sample(given, piece.tolist(), 0), sampler.predict_mean(given, piece.tolist()))
            for piece, given in zip(
                batches(indices, config.batch_size), eva.split(config.batch_size), strict=True
            )
        ]
        of_method = methods.setdefault(sampler.name, {"is_model": sampler.is_model})
        for name, tokens in zip(("sample", "best_guess"), zip(*parts, strict=True), strict=True):
            if tokens[0] is not None:
                found = quality(decoder.decode(torch.cat(tokens)), true)
                of_method[name] = {figure: bootstrap.mean(found[figure]).to_json() for figure in FIGURES}
    held_out = decoder.about.get("held_out", {})
    return {
        "samples": len(indices),
        "picture_size": decoder.config.picture_size,
        "true_tokens_psnr": held_out.get("decoder", {}).get("psnr"),
        "methods": methods,
    }


def decoded_rows(
    decoder: TokenDecoder, rows: Mapping[str, torch.Tensor], eva: torch.Tensor, samplers: Sequence[Sampler]
) -> dict[str, np.ndarray]:
    """Rows of the page, uint8 [k, S, S, 3]: those of tokens decoded, and the mean token of each position."""
    means = {
        sampler.name: sampler.predict_mean(eva, range(len(eva)))
        for sampler in samplers
        if sampler.name == "position mean"
    }
    known = {name: tokens for name, tokens in (*rows.items(), *means.items()) if tokens is not None}
    return {f"{name}, decoded": decoder.decode(tokens).numpy() for name, tokens in known.items()}


def said_of_decoded(found: Mapping[str, Any]) -> str:
    """A sentence for people: how near the methods' pictures are to those of the truth."""
    figures = [
        f"{escaped(name)} {method['sample']['psnr']['value']:.1f} dB"
        for name, method in found["methods"].items()
        if name in SAID or method["is_model"]
    ]
    return (
        f"Decoded to pictures, one sample agrees with the decoded true tokens to a PSNR of {listed(figures)} "
        f"({count(found['samples'], 'sample')}; higher is nearer)."
    )
