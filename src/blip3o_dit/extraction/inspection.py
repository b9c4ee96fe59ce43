"""What is in a store: counts, norms, outliers, and a sheet of images beside their token maps."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.data.statistics import ChannelAccumulator
from blip3o_dit.utils.json_files import printable
from blip3o_dit.utils.pca_colors import pca_colors

# Outliers listed per kind
SHOWN = 3
FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class SideInspection:
    """One side's tokens. Norms are L2 norms per token; outliers are (index, times the median).

    `largest` is the largest absolute value, `mean_to_deviation` the largest |mean| / deviation of a channel.
    """

    width: int
    norm_mean: float
    norm_std: float
    norm_min: float
    norm_max: float
    channel_mean_range: tuple[float, float]
    channel_std_range: tuple[float, float]
    largest: float
    mean_to_deviation: float
    outlier_channels: list[tuple[int, float]]
    outlier_positions: list[tuple[int, float]]
    non_finite_samples: int
    first_non_finite: str | None


@dataclass(frozen=True)
class Inspection:
    """The findings of `inspect_embeddings`; `about` is what the manifest says of the making."""

    path: str
    num_samples: int
    num_tokens: int
    captions: int
    duplicate_keys: int
    duplicate_examples: list[str]
    sides: dict[str, SideInspection]
    about: dict[str, Any] = field(default_factory=dict)


class _SideAccumulator:
    """Streamed sums over one side."""

    def __init__(self, width: int, num_tokens: int) -> None:
        self.channels = ChannelAccumulator(width)
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.norms = ChannelAccumulator(1)
        self.positions = torch.zeros(num_tokens, dtype=torch.float64)
        self.extremes = [float("inf"), 0.0]
        self.largest = 0.0
        self.bad: list[int] = []

    def add(self, tokens: Tensor, indices: Sequence[int]) -> None:
        finite = torch.isfinite(tokens).flatten(1).all(dim=1)
        self.bad += [int(i) for i in np.asarray(indices)[~finite.numpy()]]
        tokens = tokens[finite].double()
        if not len(tokens):
            return
        norms = tokens.norm(dim=-1)
        self.largest = max(self.largest, float(tokens.abs().max()))
        self.channels.add(tokens)
        self.squares += tokens.square().sum(dim=(0, 1))
        self.norms.add(norms[..., None])
        self.positions += norms.sum(dim=0)
        self.extremes = [min(self.extremes[0], float(norms.min())), max(self.extremes[1], float(norms.max()))]

    def result(self, source: Embeddings) -> SideInspection:
        if not self.channels.count:
            raise ValueError(f"{source.path}: expected finite samples, found none")
        mean, std = self.channels.mean, (self.channels.squares / self.channels.count).sqrt()
        first = source.records([self.bad[0]])[0]["key"] if self.bad else None
        return SideInspection(
            width=len(mean),
            norm_mean=float(self.norms.mean),
            norm_std=float((self.norms.squares / self.norms.count).sqrt()),
            norm_min=self.extremes[0],
            norm_max=self.extremes[1],
            channel_mean_range=(float(mean.min()), float(mean.max())),
            channel_std_range=(float(std.min()), float(std.max())),
            largest=self.largest,
            mean_to_deviation=float((mean.abs() / std.clamp_min(1e-30))[std > 0].max())
            if std.max() > 0
            else 0.0,
            outlier_channels=_outliers((self.squares / self.channels.count).sqrt()),
            outlier_positions=_outliers(self.positions),
            non_finite_samples=len(self.bad),
            first_non_finite=first,
        )


def inspect_embeddings(
    source: Embeddings,
    *,
    batch_size: int = 256,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Inspection:
    """Read every sample once, in bounded memory, and say what is there.

    NaN and infinity are counted, not refused; a damaged shard is refused (ValueError).
    """
    sides = {"eva": _SideAccumulator(source.condition_dim, source.num_tokens)}
    sides["clip"] = _SideAccumulator(source.target_dim, source.num_tokens)
    pieces: Iterable[range] = list(batches(range(source.num_samples), batch_size))
    for piece in progress(pieces) if progress else pieces:
        for side, tokens in zip(sides.values(), source.fetch(piece), strict=True):
            side.add(tokens, piece)
    records = source.records()
    repeated = [key for key, count in Counter(record["key"] for record in records).items() if count > 1]
    manifest = getattr(source, "manifest", {})
    return Inspection(
        path=str(source.path),
        num_samples=source.num_samples,
        num_tokens=source.num_tokens,
        captions=sum("caption" in record for record in records),
        duplicate_keys=len(repeated),
        duplicate_examples=repeated[:SHOWN],
        sides={name: side.result(source) for name, side in sides.items()},
        about={k: manifest[k] for k in ("dtype", "pooling", "skipped", "kept", "encoders") if k in manifest},
    )


def format_inspection(inspection: Inspection) -> str:
    """The findings as text for a terminal, warnings last."""
    lines = [
        printable(inspection.path),
        f"  samples {inspection.num_samples}, tokens {inspection.num_tokens}, captions {inspection.captions}",
    ]
    for name in ("dtype", "pooling", "skipped"):
        if inspection.about.get(name) is not None:
            lines.append(f"  {name}: {printable(inspection.about[name])}")
    if inspection.about.get("kept"):
        kept = ", ".join(f"{name} {width}" for name, width in inspection.about["kept"].items())
        lines.append(f"  vectors beside the tokens: {kept}")
    for name, side in inspection.sides.items():
        tower = inspection.about.get("encoders", {}).get(name, {})
        lines += [
            "",
            f"{name}: {side.width} wide" + (f", {printable(tower['name'])}" if "name" in tower else ""),
        ]
        lines.append(
            f"  token norm {side.norm_mean:.4g} +- {side.norm_std:.3g}, "
            f"from {side.norm_min:.4g} to {side.norm_max:.4g}"
        )
        lines.append("  channel means {:.3g} to {:.3g}".format(*side.channel_mean_range))
        lines.append("  channel deviations {:.3g} to {:.3g}".format(*side.channel_std_range))
        lines.append(
            f"  largest value {side.largest:.4g} (float16 holds up to {FLOAT16_MAX:.0f}), "
            f"means up to {side.mean_to_deviation:.3g} deviations"
        )
        lines.append("  strongest channels " + _format_outliers(side.outlier_channels))
        grid = math.isqrt(inspection.num_tokens)
        cells = [(f"row {i // grid} column {i % grid}", ratio) for i, ratio in side.outlier_positions]
        lines.append("  strongest tokens " + _format_outliers(cells))
    return "\n".join([*lines, "", *warnings_of(inspection)]) + "\n"


def warnings_of(inspection: Inspection) -> list[str]:
    """What a user should know before training on this; one line each."""
    found = []
    for name, side in inspection.sides.items():
        if side.non_finite_samples:
            found.append(
                f"warning: {name}: NaN or infinity in {side.non_finite_samples} samples, "
                f"first {printable(side.first_non_finite)}"
            )
        if inspection.about.get("encoders", {}).get(name, {}).get("meaningful") is False:
            found.append(f"warning: {name}: tower from scratch, these tokens mean nothing")
    if inspection.duplicate_keys:
        examples = ", ".join(map(printable, inspection.duplicate_examples))
        found.append(f"warning: {inspection.duplicate_keys} keys are there more than once: {examples}")
    return found or ["no NaN, no infinity, no duplicate keys"]


def draw_contact_sheet(
    path: str | Path,
    *,
    eva: Tensor,
    clip: Tensor,
    pictures: Sequence[Mapping[str, Image.Image] | None],
    titles: Sequence[Sequence[str]],
) -> None:
    """A PNG with one row per sample: its picture, and PCA-to-RGB maps of its EVA and CLIP tokens.

    Args:
        eva, clip: [k, N, C]; the principal components and the color scale are those of all k samples.
        pictures: name -> view of each sample's picture, None where it is not known.
        titles: lines of any text, by sample.
    """
    from matplotlib.figure import Figure

    rows = len(titles)
    views = list(dict.fromkeys(name for known in pictures for name in known or ())) or ["picture"]
    maps = {"EVA tokens": _color_maps(eva), "CLIP tokens": _color_maps(clip)}
    figure = Figure(figsize=(0.9 + 2.2 * (len(views) + 2), 2.3 * rows + 0.9), layout="constrained")
    figure.suptitle(
        "Samples of a store: equal colours mean nearly equal tokens of one side\n"
        "(three principal components of the tokens shown)",
        fontsize=9,
    )
    grid = figure.subplots(rows, len(views) + 2, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, heading in zip(grid[0], [*views, *maps], strict=True):
        axes.set_title(heading.replace(", ", ",\n"), fontsize=10)
    for row in range(rows):
        title = "\n".join(printable(line) for line in titles[row])
        grid[row, 0].set_ylabel(title, fontsize=8, parse_math=False)
        for axes, name in zip(grid[row], views, strict=False):
            image = (pictures[row] or {}).get(name)
            if image is None:
                axes.text(0.5, 0.5, "not known", ha="center", va="center", color="0.4")
            else:
                axes.imshow(np.asarray(image))
        for axes, colors in zip(grid[row, len(views) :], maps.values(), strict=True):
            axes.imshow(colors[row], interpolation="nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks are drawn as boxes
        figure.savefig(path, dpi=110)


def _color_maps(tokens: Tensor) -> np.ndarray:
    """[k, N, C] -> [k, n, n, 3]."""
    side = math.isqrt(tokens.shape[1])
    return pca_colors(tokens.numpy(), tokens.numpy()).reshape(len(tokens), side, side, 3)


def _outliers(strength: Tensor) -> list[tuple[int, float]]:
    """The strongest entries, each as times the median."""
    median = float(strength.median())
    order = strength.argsort(descending=True)[:SHOWN]
    return [(int(i), float(strength[i]) / median if median else float("inf")) for i in order]


def _format_outliers(outliers: Sequence[tuple[Any, float]]) -> str:
    return ", ".join(f"{name} ({ratio:.3g} x the median)" for name, ratio in outliers)
