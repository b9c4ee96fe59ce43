"""A decoder trained on a store and the pictures that it was made from: read, fit, measure, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.dataset import choose_samples
from blip3o_dit.data.embeddings import Embeddings, batches, open_embeddings
from blip3o_dit.data.statistics import streamed_statistics
from blip3o_dit.decoder.config import USUAL_SIZE, DecoderConfig, DecoderTrainingConfig, usual_picture_size
from blip3o_dit.decoder.folder import check_free, save_decoder
from blip3o_dit.decoder.network import TokenDecoder, picture_loss
from blip3o_dit.decoder.pictures import Pictures, quality, read_pictures
from blip3o_dit.decoder.pixel_ridge import PixelRidge
from blip3o_dit.extraction.shown_images import pictures_of_store
from blip3o_dit.extraction.tower_views import size_seen
from blip3o_dit.utils.distributed import pick_device
from blip3o_dit.utils.durations import in_words
from blip3o_dit.utils.folder_lock import held_folder
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.stateless_random import (
    stateless_choice,
    stateless_normal,
    stateless_permutation,
    stateless_seed,
)

# Training pictures are kept in memory, of so many bytes at most.
MAX_BYTES = 4 * 2**30
# Most held-out pictures that are measured, and training pictures that the ridge is fitted on
MAX_MEASURED, MAX_RIDGE = 1000, 2000
# What follows from the data: passes, and the steps that they may come to
PASSES, LEAST_STEPS, MOST_STEPS = 10, 400, 4000
LINES = 5  # in the log
MEASURED = "pictures that a decoder is measured on"

logger = logging.getLogger(__name__)


def train_decoder(
    embeddings: str | Path | Embeddings,
    images: str | Path,
    output_dir: str | Path,
    config: DecoderTrainingConfig | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Train a decoder of a store's target tokens, and save it.

    The same seed, data and machine give the same weights. Nothing is written before all is done.

    Args:
        images: where the pictures are that the store was made from, as for `extract`.
        overwrite: replace a decoder that is there.

    Returns: of the decoder, the ridge and the mean picture, `psnr` (dB) and `l1` (0..1), means over held-out
        pictures.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
        WriteError: when the disk is full.
    """
    config, output = config or DecoderTrainingConfig(), Path(output_dir)
    check_free(output, overwrite=overwrite)
    device = pick_device(config.device)
    source = open_embeddings(embeddings) if isinstance(embeddings, str | Path) else embeddings
    manifest = getattr(source, "manifest", {})
    sizes = _sizes(source, manifest, config)
    with held_folder(output, "the training of a decoder"):
        split = config.split(source)
        train = np.sort(choose_samples(split.train, max_samples=config.num_samples, seed=config.seed))
        measured = stateless_choice(len(split.eval), MAX_MEASURED, seed=config.seed, stream=MEASURED)
        _check_memory(len(train), sizes)
        shown = pictures_of_store(manifest, str(images), pixels=sizes.picture_size)
        pictures, held_out = (
            read_pictures(shown, source, indices, sizes.picture_size, images)
            for indices in (train, split.eval[measured])
        )
        decoder = _fit(source, pictures, sizes, config, device)
        with working("measuring the decoder on held-out pictures"):
            found = _measure(decoder, source, pictures, held_out)
        decoder.about = {
            "settings": asdict(config),
            "embeddings": str(source.path),
            "train_samples": len(pictures),
            "held_out_samples": len(held_out),
            "held_out": found,
        }
        save_decoder(decoder.cpu(), output)
    return found


def _sizes(source: Embeddings, manifest: Any, config: DecoderTrainingConfig) -> DecoderConfig:
    size = config.picture_size
    if size is None:
        seen = size_seen(manifest, "clip") or USUAL_SIZE
        size = usual_picture_size(source.num_tokens, min(seen, USUAL_SIZE))
    return DecoderConfig(
        num_tokens=source.num_tokens,
        channels=source.target_dim,
        picture_size=size,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        normalize_embeddings=config.normalize_embeddings,
    )


def _check_memory(count: int, sizes: DecoderConfig) -> None:
    """Refuse (ValueError) more training pictures than are kept in memory."""
    each = 3 * sizes.picture_size**2
    if count * each > MAX_BYTES:
        raise ValueError(
            f"num_samples: expected at most {MAX_BYTES // each} pictures of {sizes.picture_size} pixels, as "
            f"{MAX_BYTES / 2**30:g} GiB hold, found {count}"
        )


def _fit(
    source: Embeddings,
    pictures: Pictures,
    sizes: DecoderConfig,
    config: DecoderTrainingConfig,
    device: torch.device,
) -> TokenDecoder:
    """A new decoder, trained."""
    with working("taking statistics of the tokens"):
        known = streamed_statistics(source, pictures.indices, normalize=sizes.normalize_embeddings)[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stateless_seed(config.seed, "decoder weights"))
        decoder = TokenDecoder(sizes)
    decoder.token_mean.copy_(known.mean)
    decoder.token_std.copy_(known.std)
    decoder.mean_picture.copy_(_mean_picture(pictures))
    decoder.to(device).train()
    passes = PASSES * len(pictures) // config.batch_size
    steps = config.steps or min(max(passes, LEAST_STEPS), MOST_STEPS)
    weights = sum(parameter.numel() for parameter in decoder.parameters())
    logger.info(
        "a decoder of %.2g million parameters, for pictures of %d pixels: %d steps of %d pictures",
        *(weights / 1e6, sizes.picture_size, steps, config.batch_size),
    )
    fit_decoder(decoder, source, pictures, replace(config, steps=steps))
    return decoder.eval()


def _mean_picture(pictures: Pictures) -> Tensor:
    """[3, S, S] in 0..1."""
    total = sum(piece.double().sum(dim=0) for piece in pictures.pixels.split(256))
    return (total / len(pictures) / 255).permute(2, 0, 1).float()


def fit_decoder(
    decoder: TokenDecoder, source: Embeddings, pictures: Pictures, config: DecoderTrainingConfig
) -> None:
    """AdamW, a warm-up over a twentieth of the steps, and a cosine to zero."""
    steps, device = config.steps or 1, decoder.token_mean.device
    optimizer = torch.optim.AdamW(decoder.parameters(), config.learning_rate, (0.9, 0.95), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    started, every = time.monotonic(), -(-steps // LINES)
    with working("training the decoder", steps, "step", lasting=False) as bar:
        for step, (epoch, rows) in enumerate(islice(_batches(len(pictures), config), steps), 1):
            indices = pictures.indices[rows]
            tokens = decoder.standardize(source.fetch(indices)[1].to(device))
            tokens = tokens + noise(indices, tokens, tau=config.noise, seed=config.seed, epoch=epoch)
            loss = picture_loss(decoder(tokens), pictures.floats(rows).to(device), edges=config.edges)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0).isfinite():
                raise ValueError(
                    f"learning_rate {config.learning_rate:g}: the loss of step {step} is not finite"
                )
            optimizer.step()
            schedule.step()
            bar(1)
            if step % every == 0 and step < steps:
                left = (time.monotonic() - started) / step * (steps - step)
                logger.info("step %d of %d: loss %.4f, %s left", step, steps, loss.item(), in_words(left))


def _batches(samples: int, config: DecoderTrainingConfig) -> Iterator[tuple[int, np.ndarray]]:
    """Without end, (epoch, rows): every picture once in an epoch, the last batch perhaps shorter."""
    for epoch in count():
        order = stateless_permutation(samples, seed=config.seed, stream="decoder order", counter=epoch)
        for rows in batches(order, config.batch_size):
            yield epoch, rows


def noise(indices: np.ndarray, tokens: Tensor, *, tau: float, seed: int, epoch: int) -> Tensor:
    """What is added to standardised tokens [B, N, C] in training: N(0, s^2), with s = |N(0, tau^2)| a sample.

    A decoder then takes generated tokens, which are not quite true ones (RAE, arXiv 2510.11690, 4.3).
    """
    samples: list[int] = indices.tolist()
    named: dict[str, Any] = {"seed": seed, "counter": epoch, "device": tokens.device}
    level = tau * stateless_normal(samples, (1, 1), stream="decoder noise level", **named).abs()
    return level * stateless_normal(samples, tokens.shape[1:], stream="decoder noise", **named)


def _measure(
    decoder: TokenDecoder, source: Embeddings, train: Pictures, held_out: Pictures
) -> dict[str, dict[str, float]]:
    """Method -> `quality`, means over the held-out pictures."""
    ridge = PixelRidge.fit(decoder, source, train, max_samples=MAX_RIDGE)
    mean = (255 * decoder.mean_picture).round().byte().permute(1, 2, 0).cpu()
    sums: dict[str, dict[str, float]] = {}
    for rows in batches(np.arange(len(held_out)), 64):
        tokens, true = source.fetch(held_out.indices[rows])[1], held_out.pixels[rows]
        painted = {
            "decoder": decoder.decode(tokens),
            "ridge": ridge.decode(tokens),
            "mean picture": mean.expand_as(true),
        }
        for name, pixels in painted.items():
            of_method = sums.setdefault(name, {})
            for figure, values in quality(pixels, true).items():
                of_method[figure] = of_method.get(figure, 0.0) + float(values.sum()) / len(held_out)
    return sums
