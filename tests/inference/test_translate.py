"""blip3o-dit translate: an index's vectors by another embedding model, and how sure each of them is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blip3o_dit.cli.main import main
from blip3o_dit.data import vector_files
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.translate import Translation, translate_file, translate_vectors
from blip3o_dit.metrics.conditional import spread_and_error
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from tests.conftest import tiny_config
from tests.data.test_store import refused
from tests.helpers.stores import write_linear_store
from tests.helpers.training import train_model

COUNT = 11
FAST = dict(num_inference_steps=2, solver="euler")
WORDS = ["--num_inference_steps", "2", "--solver", "euler", "--device", "cpu"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one token, [1, 12] to [1, 8], after one step."""
    root = tmp_path_factory.mktemp("vectors")
    store = write_linear_store(root / "store", samples=300, tokens=1)
    train_model(store, root / "model", max_steps=1, eval_split=0.1, save_steps=100)
    return root


@pytest.fixture(scope="module")
def inference(root: Path) -> BLIP3oInference:
    return BLIP3oInference(root / "model", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(1).normal(3.0, 1.0, (COUNT, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(inference: BLIP3oInference, vectors: np.ndarray) -> Translation:
    return inference.translate(vectors, draws=3, way="mean", **FAST)


def draws_of(model: BLIP3oDiTModel, vectors: np.ndarray, count: int) -> Tensor:
    eva = vectors[:, None]
    return torch.stack([model.generate(eva, sample_number=k, **FAST)[:, 0] for k in range(count)])


def test_the_mean_of_the_draws_and_their_spread(
    inference: BLIP3oInference, vectors: np.ndarray, expected: Translation
) -> None:
    """The spread is what the scores of calibration call it, here of all numbers together."""
    draws = draws_of(inference.model, vectors, 3)
    estimates = [inference.model.predict_mean(vectors[:, None], sample_number=k) for k in range(3)]
    torch.testing.assert_close(expected.vectors, draws.mean(dim=0))
    score = spread_and_error(draws, torch.zeros_like(draws[0])).spread
    torch.testing.assert_close(expected.spread, (8 * score).sqrt().float())
    for way, vector in (
        ("sample", draws[0]),
        (None, torch.stack(estimates).mean(dim=0)[:, 0]),
    ):
        found = translate_vectors(inference.model, torch.from_numpy(vectors), draws=3, way=way, **FAST)
        torch.testing.assert_close(found.vectors, vector)
        assert torch.equal(found.spread, expected.spread)


def test_the_spread_is_how_far_the_true_vectors_are(root: Path, inference: BLIP3oInference) -> None:
    """On a linear map and Gaussian noise, where the source alone is the true distribution."""
    eva, clip = EmbeddingStore(root / "store").fetch(range(300))
    found = inference.translate(eva[:, 0], draws=8, num_inference_steps=2)
    error = float((found.vectors - clip[:, 0]).norm(dim=1).square().mean().sqrt())
    assert error == pytest.approx(float(found.spread.square().mean().sqrt()), rel=0.1)
    assert error < 0.5 * clip[:, 0].std(dim=0).norm()


def test_vectors_of_length_1_stay_so(inference: BLIP3oInference, vectors: np.ndarray) -> None:
    model = inference.model
    model.config.normalize_embeddings = True
    try:
        found = translate_vectors(model, vectors, draws=3, **FAST)
    finally:
        model.config.normalize_embeddings = False
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(COUNT))


def write(folder: Path, kind: str, vectors: np.ndarray, **more: Any) -> Path:
    path = folder / f"old{kind}"
    ids = np.arange(100, 100 + len(vectors))
    if kind == ".npy":
        np.save(path, vectors.astype(np.float64))
    elif kind == ".npz":
        np.savez(path, embedding=vectors, ids=ids, words=np.array([f"w{i}" for i in ids]), **more)
    elif kind == ".safetensors":
        save_file({"embedding": torch.from_numpy(vectors), "ids": torch.from_numpy(ids), **more}, path)
    else:
        flat = pa.array(vectors.ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]) if vectors.size else flat
        table = {"ids": ids, "embedding": column, "note": [None, *["ü"] * (len(vectors) - 1)]}
        pq.write_table(pa.table(table | more), path, row_group_size=6)
    return path


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        (".npy", "new.npy"),
        (".parquet", "new.npy"),
        *[(kind, "in/new.parquet") for kind in (".npy", ".npz", ".safetensors", ".parquet")],
    ],
)
def test_files_in_and_out_in_order(
    inference: BLIP3oInference,
    tmp_path: Path,
    vectors: np.ndarray,
    expected: Translation,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    output: str,
) -> None:
    """In blocks of 4 that row groups of 6 cut through; what stands beside the vectors stays beside them."""
    monkeypatch.setattr(vector_files, "BLOCK", 4)
    old, new = write(tmp_path, kind, vectors), tmp_path / output
    assert translate_file(inference, old, new, draws=3, way="mean", batch_size=3, **FAST) == COUNT
    if output == "new.npy":
        found, spread = np.load(new), np.load(tmp_path / "new.spread.npy")
    else:
        table = pq.read_table(new)
        name = "old" if kind == ".npy" else "embedding"
        found, spread = np.stack(table[name].to_numpy()), table["spread"].to_numpy()
        if kind != ".npy":
            assert table["ids"].to_pylist() == list(range(100, 100 + COUNT))
        if kind == ".parquet":
            assert table.column_names == ["ids", "embedding", "note", "spread"]
            assert table["note"].to_pylist() == [None, *["ü"] * (COUNT - 1)]
    assert found.dtype == spread.dtype == np.float32
    np.testing.assert_allclose(found, expected.vectors.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(spread, expected.spread.numpy(), rtol=1e-4)
    assert not list(new.parent.glob("*.parts")) and not list(new.parent.glob("*.partial"))


def test_a_stopped_translation_goes_on(
    root: Path,
    tmp_path: Path,
    vectors: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = "new.npy"
    monkeypatch.setattr(vector_files, "BLOCK", 4)
    old, new = write(tmp_path, ".parquet", vectors), tmp_path / output
    words = ["translate", str(root / "model"), str(old), str(new), "--draws=2", "--way=mean", *WORDS]
    assert main([*words[:3], str(tmp_path / f"whole {output}"), *words[4:]]) == 0
    generate, calls = BLIP3oDiTModel.generate, []

    def stopped(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:  # in the second block
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BLIP3oDiTModel, "generate", stopped)
        assert main(words) == 75
    assert "what is translated is kept: the same command goes on" in capsys.readouterr().err
    assert main([*words, "--seed", "1"]) == 2
    assert "seed is 0 there, 1 here" in capsys.readouterr().err
    block = next((tmp_path / f"{output}.parts").glob("block-*"))
    kept = block.read_bytes()
    for content, left in ((kept[:-4], 6), (kept, 4)):  # a damaged block is translated again
        calls.clear()
        new.unlink(missing_ok=True)
        (tmp_path / "new.spread.npy").unlink(missing_ok=True)
        if left == 6:
            block.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(BLIP3oDiTModel, "generate", lambda *a, **b: calls.append(1) or generate(*a, **b))
            patch.setattr("blip3o_dit.inference.unfinished.Unfinished.clear", lambda self: None)
            assert main(words) == 0
        assert len(calls) == (6 if left == 6 else 0)
    assert new.read_bytes() == (tmp_path / f"whole {output}").read_bytes()
    assert main(words) == 2 and "expected no file there, found one" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "width": (".npy", "wide", {}, "expected vectors [samples, 12], found other widths, {'old': 13}"),
    "rank": (".npy", "tokens", {}, "expected vectors [samples, 12], found none in ['old']"),
    "column": (".npz", "plain", {"column": "x"}, "x: expected vectors of 12 numbers, found no such vectors"),
    "two": (".npz", "two", {}, "one of ['embedding', 'other'], as all are 12 numbers wide"),
    "two columns": (".parquet", "two", {}, "expected --column, one of ['embedding', 'other']"),
    "none": (".npz", "none", {}, "expected at least one vector, found none"),
    "nan": (".parquet", "nan", {}, "embedding: expected finite numbers, found NaN or infinity in row 7"),
    "draws": (".npy", "plain", {"draws": 1}, "draws: expected an integer >= 2, found 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_translated_is_refused(
    inference: BLIP3oInference, tmp_path: Path, vectors: np.ndarray, name: str
) -> None:
    kind, content, options, message = REFUSED[name]
    changed, more = vectors.copy(), {}
    if content == "wide":
        changed = np.pad(vectors, ((0, 0), (0, 1)))
    elif content == "tokens":
        changed = vectors.reshape(COUNT, 3, 4)
    elif content == "two":
        column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), 12)
        more = {"other": vectors if kind == ".npz" else column}
    elif content == "none":
        changed = vectors[:0]
    elif content == "nan":
        changed[7, 2] = np.nan
    old = write(tmp_path, kind, changed, **more)
    before = sorted(tmp_path.iterdir())
    assert message in refused(
        lambda: translate_file(inference, old, tmp_path / "new.npy", progress=False, **options)
    )
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_and_models_that_do_not_fit_are_refused(
    tmp_path: Path, vectors: np.ndarray, inference: BLIP3oInference
) -> None:
    old = write(tmp_path, ".parquet", vectors, spread=np.zeros(COUNT))
    assert "expected no column 'spread', which is to be written" in refused(
        lambda: translate_file(inference, old, tmp_path / "new.parquet")
    )
    assert "ends in .npy or .parquet, found '.pkl'" in refused(
        lambda: translate_file(inference, old, tmp_path / "new.pkl")
    )
    assert "another place than that of the vectors" in refused(
        lambda: translate_file(inference, old, old, overwrite=True)
    )
    (tmp_path / "new.spread.npy").touch()
    assert "new.spread.npy: expected no file there" in refused(
        lambda: translate_file(inference, old, tmp_path / "new.npy")
    )
    grid = BLIP3oDiTModel(tiny_config())
    assert "expected a model of one vector a sample, found one of 9 tokens" in refused(
        lambda: translate_vectors(grid, vectors)
    )
    assert "way: expected one of" in refused(lambda: inference.translate(vectors, way="median"))
