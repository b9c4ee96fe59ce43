"""blip3o-dit decode: one PNG a sample, all of them or none."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.decoder import decode_embeddings
from blip3o_dit.decoder.folder import save_decoder
from tests.helpers.painted import painted_store, picture_at, random_decoder
from tests.helpers.stores import write_linear_store

KEYS = ("a/00.png", "b..", "../../etc/passwd", "é\n", "k" * 300 + "1", "k" * 300 + "2", "plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, its pictures and a decoder."""
    folder = tmp_path_factory.mktemp("decode")
    painted_store(folder, samples=20)
    save_decoder(random_decoder(), folder / "decoder")
    return folder


def test_each_picture_is_its_sample_s(folder: Path, tmp_path: Path) -> None:
    decoder, store = random_decoder(), EmbeddingStore(folder / "store")
    assert decode_embeddings(decoder, store, tmp_path / "out", batch_size=7) == 20
    names = [file.name for file in sorted((tmp_path / "out").iterdir())]
    assert names == [f"{index:02d}.png" for index in range(20)]
    for index in (0, 6, 7, 19):
        expected = decoder.decode(store.fetch([index])[1])[0].numpy().astype(int)
        found = picture_at(tmp_path / "out" / f"{index:02d}.png")
        assert np.abs(found - expected).max() <= 1  # batches round differently


def test_the_command(folder: Path, tmp_path: Path) -> None:
    words = ["decode", str(folder / "decoder"), str(folder / "store"), str(tmp_path / "out")]
    assert main([*words, "--num_samples=3", "--seed=1", "--device=cpu"]) == 0
    some = {file.name for file in (tmp_path / "out").iterdir()}
    assert len(some) == 3
    assert main([*words, "--num_samples=3", "--seed=2", "--overwrite"]) == 0
    others = {file.name for file in (tmp_path / "out").iterdir()}
    assert len(others) == 3 and others != some


def test_it_reads_what_generate_writes(folder: Path, tmp_path: Path) -> None:
    """A file of arrays whose targets are called generated."""
    eva, clip = (tokens.numpy() for tokens in EmbeddingStore(folder / "store").fetch([3, 4]))
    keys = np.frombuffer(b'["x", "y"]', np.uint8)
    np.savez(
        tmp_path / "generated.npz",
        eva_embeddings=eva,
        target_clip_embeddings=np.zeros_like(clip),
        generated_clip_embeddings=clip,
        keys=keys,
    )
    words = ["decode", str(folder / "decoder"), str(tmp_path / "generated.npz"), str(tmp_path / "out")]
    assert main(words) == 0
    expected = random_decoder().decode(torch.from_numpy(clip)).numpy()
    for name, pixels in zip("xy", expected, strict=True):
        assert np.abs(picture_at(tmp_path / "out" / f"{name}.png").astype(int) - pixels).max() <= 1


def test_keys_become_names_of_files_in_the_folder(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", num_tokens=9, condition_dim=2, target_dim=8) as writer:
        tokens = torch.randn(len(KEYS), 9, 8)
        writer.append(torch.zeros(len(KEYS), 9, 2), tokens, [{"key": key} for key in KEYS])
    decode_embeddings(random_decoder(), EmbeddingStore(tmp_path / "store"), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("a%2F00.png", "b...png", "..%2F..%2Fetc%2Fpasswd.png", "%C3%A9%0A.png", "plain.png"),
        *("k" * 200 + "-4.png", "k" * 200 + "-5.png"),
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "store"]


def test_what_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_linear_store(tmp_path / "wide", samples=4, target=10)
    write_linear_store(tmp_path / "grid", samples=4, tokens=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    decoder, store, out = str(folder / "decoder"), str(folder / "store"), str(tmp_path / "out")
    for words, message in (
        ([decoder, str(tmp_path / "wide"), out], "expected 9 tokens of 8 numbers, .* found 9 of 10"),
        ([decoder, str(tmp_path / "grid"), out], "expected 9 tokens of 8 numbers, .* found 4 of 8"),
        ([decoder, store, str(tmp_path / "full")], "expected a new folder, found a folder with"),
        (
            [decoder, store, str(tmp_path / "full"), "--overwrite"],
            "expected a new folder, found a folder with",
        ),
        ([decoder, store, str(folder / "painted")], "found a folder of pictures .--overwrite replaces it"),
        ([store, store, out], "expected a decoder's folder, found an embedding store: `blip3o-dit train-dec"),
        ([decoder, decoder, out], "expected embeddings .* found a decoder of tokens to pictures"),
        ([decoder, store, out, "--num_samples=0"], "num_samples: expected an integer >= 1, found 0"),
    ):
        assert main(["decode", *words]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_an_interrupted_command_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, store = random_decoder(), EmbeddingStore(folder / "store")
    whole, calls = decoder.decode, []

    def stops(tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(tokens)

    monkeypatch.setattr(decoder, "decode", stops)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        decode_embeddings(decoder, store, tmp_path / "out", batch_size=7)
    assert [file.name for file in tmp_path.rglob("*")] == ["out"]


def test_tokens_of_another_scale_are_said(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    decoder, store = random_decoder(), EmbeddingStore(folder / "store")
    tokens = store.fetch(range(20))[1].flatten(0, 1)
    decoder.token_mean.copy_(tokens.mean(dim=0))
    decoder.token_std.copy_(tokens.std(dim=0))
    with caplog.at_level(logging.WARNING):
        decode_embeddings(decoder, store, tmp_path / "fits")
        assert not caplog.text
        decoder.token_std.mul_(0.2)
        decode_embeddings(decoder, store, tmp_path / "not")
    assert "its tokens deviate 4.99 times as much" in caplog.text
