"""One embedding model's vectors become another's, with how far off each may be: `blip3o-dit translate`.

For a model of one token. What an index is given is one vector; the draws say how sure of it the model is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blip3o_dit.data.choices import WAYS
from blip3o_dit.data.embeddings import batches
from blip3o_dit.data.vector_files import (
    VectorFile,
    check_columns,
    check_vector_output,
    open_vectors,
    write_vectors,
)
from blip3o_dit.inference.output import check_writable
from blip3o_dit.inference.progress import SampleBar
from blip3o_dit.inference.request import Sampling
from blip3o_dit.inference.unfinished import Unfinished, file_claimed
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.utils.atomic import save_tensors
from blip3o_dit.utils.checksums import sha256
from blip3o_dit.utils.validation import check_name, checked_integer

if TYPE_CHECKING:
    from blip3o_dit.inference.pipeline import BLIP3oInference

DRAWS = 8


class Translation(NamedTuple):
    """Vectors [n, C] in the units of the training data, and the spread [n] of each; float32 on the CPU.

    The spread estimates how far the true vector is away, as a root mean square. Of K draws x_k with the mean
    m it is sqrt((1 + 1 / K) / (K - 1) sum_k |x_k - m|^2), over all C numbers: if the draws are distributed as
    the true vector is, given the condition, that is the root mean square of |m - true vector| (Fortin et al.
    2014, equation 15). Calibration fits the noise that draws start from so that it does on samples held back.
    """

    vectors: Tensor
    spread: Tensor


@torch.no_grad()
def translate_vectors(
    model: BLIP3oDiTModel,
    vectors: Tensor | np.ndarray,
    *,
    draws: int = DRAWS,
    way: str | None = None,
    sample_index: Sequence[int] | None = None,
    **sampling: Any,
) -> Translation:
    """Translate vectors [n, C_eva] by a model of one token.

    Args:
        draws: K, of each vector, at least 2.
        way: "estimate", the mean that one network call says at t = 0, averaged over the K noises; "mean",
            that of the draws; "sample", the first of them. None takes the first that the model has.
        sample_index: names the noise of each; 0 to n-1 by default.
        sampling: as for `BLIP3oDiTModel.generate`.

    Raises:
        ValueError: one line: for other shapes and values, a model of several tokens, a way that it has not.
    """
    way = checked_way(model, way)
    draws = checked_integer("draws", draws, low=2)
    conditions = vectors[:, None] if vectors.ndim == 2 else vectors
    drawn = torch.stack(
        [
            model.generate(conditions, sample_index=sample_index, sample_number=number, **sampling)[:, 0]
            for number in range(draws)
        ]
    )
    centre = drawn.mean(dim=0)
    spread = spread_of(drawn)
    if way == "sample":
        centre = drawn[0]
    elif way == "estimate":
        names: dict[str, Any] = {"seed": sampling.get("seed", 0), "sample_index": sample_index}
        estimates = [model.predict_mean(conditions, sample_number=k, **names) for k in range(draws)]
        centre = torch.stack(estimates).mean(dim=0)[:, 0]
    if model.config.normalize_embeddings:
        centre = F.normalize(centre, dim=-1)
    return Translation(centre.cpu(), spread.cpu())


def spread_of(drawn: Tensor) -> Tensor:
    """The spread [...] of K draws [K, ..., C] of each vector, as in `Translation`."""
    draws = len(drawn)
    squares = (drawn - drawn.mean(dim=0)).square().sum(dim=(0, -1))
    return ((1 + 1 / draws) / (draws - 1) * squares).sqrt()


def checked_way(model: BLIP3oDiTModel, way: str | None) -> str:
    """One of `WAYS`. Raises ValueError for others, and for a model of several tokens."""
    flow = model.config.flow
    if way is None:
        estimates = flow.fixed_sampling is None and flow.prediction.gives_mean_at_noise
        way = "estimate" if estimates else "mean"
    check_name("way", way, WAYS)
    if model.config.num_tokens != 1:
        raise ValueError(
            f"translate: expected a model of one vector a sample, found one of "
            f"{model.config.num_tokens} tokens (`blip3o-dit generate` makes these)"
        )
    return way


def translate_file(
    inference: BLIP3oInference,
    vectors: str | Path,
    output: str | Path,
    *,
    column: str | None = None,
    draws: int = DRAWS,
    way: str | None = None,
    batch_size: int = 256,
    overwrite: bool = False,
    progress: bool = True,
    **sampling: Any,
) -> int:
    """Translate the vectors of a file into a .npy or parquet file, a block at a time, in one process.

    What a stopped run has translated is kept beside the output, and the same call goes on with it.

    Args:
        vectors, column: see `open_vectors`. output: see `write_vectors`.
        draws, way: see `translate_vectors`. sampling: as for `Sampling`.

    Returns: how many there were.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and found.
    """
    vectors, output, how = Path(vectors), Path(output), Sampling(**sampling)
    draws = checked_integer("draws", draws, low=2)
    batch_size = checked_integer("batch_size", batch_size, low=1)
    way = checked_way(inference.model, way)
    check_vector_output(output, overwrite)
    check_writable(output)
    config = inference.model.config
    source = open_vectors(vectors, config.eva_embedding_size, column)
    check_columns(source, output)
    data = {"sha256": sha256(vectors), "column": source.name}
    request = inference.request(data, how, batch_size=batch_size, draws=draws, way=way)
    job = _Job(inference.model, source, Unfinished(output, file=True).folder, batch_size)
    with file_claimed(output, request, overwrite=overwrite, size=1):
        with inference.sample_bar(draws * source.count, how, progress) as bar:
            for start, block, _ in source.blocks():
                if job.kept(start, len(block)) is not None:
                    bar.found(draws * len(block))
                    continue
                job.translate(start, block, bar, draws=draws, way=way, **asdict(how))
        write_vectors(output, source, job.parts(), config.in_channels)
    return source.count


@dataclass(frozen=True)
class _Job:
    """Blocks of a file, translated into files of a folder."""

    model: BLIP3oDiTModel
    source: VectorFile
    folder: Path
    batch_size: int

    def translate(self, start: int, block: Tensor, bar: SampleBar, *, draws: int, **how: Any) -> None:
        """The block that begins at this row; a row's number names its noise."""
        parts = []
        for rows in batches(range(len(block)), self.batch_size):
            numbers = range(start + rows.start, start + rows.stop)
            piece = block[rows.start : rows.stop]
            parts.append(translate_vectors(self.model, piece, draws=draws, sample_index=numbers, **how))
            bar.sampled(draws * len(rows))
        sides = [torch.cat(side) for side in zip(*parts, strict=True)]
        save_tensors(Translation(*sides)._asdict(), self._file(start))

    def kept(self, start: int, count: int) -> Translation | None:
        """The block that begins at this row, if it was translated and can be read."""
        if not self._file(start).is_file():
            return None
        try:
            found = Translation(**load_file(self._file(start)))
        except (SafetensorError, OSError, TypeError):
            return None
        sizes = [(count, self.model.config.in_channels), (count,)]
        return found if [tuple(tensor.shape) for tensor in found] == sizes else None

    def parts(self) -> Iterator[Translation]:
        """All blocks in order."""
        for start, block, _ in self.source.blocks():
            found = self.kept(start, len(block))
            if found is None:
                raise ValueError(f"{self._file(start)}: expected what was translated, found it changed")
            yield found

    def _file(self, start: int) -> Path:
        return self.folder / f"block-{start:012d}.safetensors"
