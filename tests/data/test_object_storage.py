"""Training on a store that lies elsewhere: the bits of one on this disk, with a tenth of it in the cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from blip3o_dit.data import shard_cache
from blip3o_dit.data.dataset import EmbeddingDataset
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.data.worker_batches import whole_batch
from blip3o_dit.publish import push_to_address
from blip3o_dit.training.run import train
from blip3o_dit.utils import addresses
from blip3o_dit.utils.addresses import located
from tests.helpers.remote import counted
from tests.helpers.stores import write_linear_store
from tests.helpers.training import same, tiny_training

SAMPLE, SAMPLES = 4 * 9 * (12 + 8), 48
SETTINGS = dict(max_steps=4, batch_size=12, eval_split=0.25, eval_samples=2, source="noise", seed=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def trained(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_training(store.path, tmp_path_factory.mktemp("run") / "run", **SETTINGS))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server on this machine; its address for clients."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def address(request: pytest.FixtureRequest, store: EmbeddingStore) -> str:
    if request.param == "memory":
        return push_to_address(store.path, "memory://trained-on", overwrite=True)
    request.getfixturevalue("server")
    import s3fs

    s3fs.S3FileSystem().mkdir("bucket")
    return push_to_address(store.path, "s3://bucket/stores/linear")


@pytest.mark.parametrize("address", ["memory", "s3"], indirect=True)
def test_a_run_has_the_same_bits(
    address: str, store: EmbeddingStore, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP3O_DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BLIP3O_DIT_CACHE_GB", str(SAMPLES * SAMPLE / 10 / 1e9))
    monkeypatch.setattr(shard_cache, "_size_of", lambda file: 0)  # blocks are larger than these shards
    with counted() as traffic:
        run = train(tiny_training(located(address), tmp_path / "run", **SETTINGS))
    for name in ("model.safetensors", "model.ema.safetensors"):
        assert same(load_file(run / name), load_file(trained / name)), name
    # The manifest and headers; statistics of 36 samples, 4 steps of 12, evaluations and a calibration.
    assert 1.5 < traffic.bytes / (SAMPLES * SAMPLE) < 2.5
    # A worker process connects for itself.
    loader = DataLoader(
        EmbeddingDataset(EmbeddingStore(address), torch.arange(SAMPLES).numpy()),
        batch_size=6,
        num_workers=1,
        collate_fn=whole_batch,
    )
    (batch, *_) = loader
    assert torch.equal(batch["clip"], store.fetch(range(6))[1])


def test_what_s3_refuses(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLIP3O_DIT_CACHE", str(tmp_path))
    monkeypatch.setattr(addresses, "RETRY_AFTER", (0.0,))
    with pytest.raises(FileNotFoundError, match=r"^s3://nobody/store: expected an embedding store there"):
        EmbeddingStore("s3://nobody/store")
