"""Opening embeddings, views of them, and batches of indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_dit.data.convert import convert_pickle
from blip3o_dit.data.embeddings import TransformedEmbeddings, batches, check_sizes, open_embeddings
from blip3o_dit.data.pickle_format import PickledEmbeddings
from blip3o_dit.data.store import EmbeddingStore
from tests.data.test_pickle_format import documented, dump, refused


def test_a_folder_opens_as_store_and_a_file_as_pickle(tmp_path: Path) -> None:
    path = dump(tmp_path / "e.pkl", documented())
    convert_pickle(path, tmp_path / "store")
    assert isinstance(open_embeddings(str(path)), PickledEmbeddings)
    assert isinstance(open_embeddings(str(tmp_path / "store")), EmbeddingStore)
    with pytest.raises(FileNotFoundError, match=r"none\.pkl"):
        open_embeddings(tmp_path / "none.pkl")
    assert "found a folder of stores: name one of them: ['store']" in refused(
        lambda: open_embeddings(tmp_path)
    )


def test_a_view_transforms_tokens_and_keeps_records_and_sizes(tmp_path: Path) -> None:
    source = open_embeddings(dump(tmp_path / "e.pkl", documented()))
    view = TransformedEmbeddings(source, lambda eva: -eva, lambda clip: 2 * clip)
    for found, stored, factor in zip(view.fetch([3, 0]), source.fetch([3, 0]), (-1, 2), strict=True):
        assert torch.equal(found, factor * stored)
    assert view.records([1]) == source.records([1])
    check_sizes(view, (4, 6, 3), "a model")
    assert "expected (tokens, eva width, clip width) (4, 6, 5) as the model at m, found (4, 6, 3)" in refused(
        lambda: check_sizes(view, (4, 6, 5), "m")
    )


def test_batches_are_consecutive_and_the_last_one_is_short() -> None:
    assert list(batches(range(5), 2)) == [range(0, 2), range(2, 4), range(4, 5)]
    assert [part.tolist() for part in batches(np.array([7, 3, 5]), 2)] == [[7, 3], [5]]
