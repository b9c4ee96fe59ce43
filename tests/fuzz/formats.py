"""One valid small example of each format, how it is damaged, and the entry point that must bear it."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import pickletools
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from blip3o_dit.data.convert import convert_pickle
from blip3o_dit.data.dataset import split_samples
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.manifest import MANIFEST
from blip3o_dit.data.store import StoreWriter
from blip3o_dit.decoder.config import DecoderConfig
from blip3o_dit.decoder.folder import save_decoder
from blip3o_dit.decoder.network import TokenDecoder
from blip3o_dit.extraction.image_decoding import UnreadableImageError, decode_image
from blip3o_dit.extraction.inspection import format_inspection, inspect_embeddings
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.loading import EMA_FILE, EMA_VARIANT
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.validation import error_context
from tests.conftest import randomize, tiny_config
from tests.data.test_safe_unpickler import HOSTILE
from tests.fuzz.judge import Trial
from tests.fuzz.mutators import HOSTILE_NAMES, mutate_bytes, mutate_json, mutate_safetensors
from tests.helpers.stores import without_sample_checksums

Make = Callable[[int], Trial]
TOKENS, CONDITION, TARGET = 4, 6, 3


def write_store(path: Path, count: int = 5) -> Path:
    """Two shards, three files to read from."""
    generator = torch.Generator().manual_seed(1)
    sizes = dict(num_tokens=TOKENS, condition_dim=CONDITION, target_dim=TARGET)
    about: dict[str, Any] = {"encoders": {"eva": {"name": "a"}, "clip": {"name": "b", "meaningful": True}}}
    with StoreWriter(path, **sizes, shard_size=3, **about, pooling="mean") as writer:
        eva = torch.randn(count, TOKENS, CONDITION, generator=generator)
        clip = torch.randn(count, TOKENS, TARGET, generator=generator)
        writer.append(eva, clip, [{"key": f"k{i}", "caption": f"c {i}", "label": 1} for i in range(count)])
    return path


def write_model(folder: Path) -> Path:
    """What a training run leaves, as small as the real class can be."""
    sizes = dict(model_dim=8, num_layers=1, num_heads=1, ffn_dim=8, input_size=2)
    flow = {"source": "ridge_3x3", "source_components": 2, "prediction_type": "preconditioned"}
    widths = dict(in_channels=TARGET, eva_embedding_size=CONDITION)
    model = BLIP3oDiTModel(tiny_config(**sizes, **widths, flow_matching=flow, default_steps=2))
    randomize(model)
    model.save_pretrained(folder)
    model.save_pretrained(folder, variant=EMA_VARIANT)
    config = TrainingConfig(embeddings_path="store", output_dir="run", model_dim=8, num_heads=1)
    (folder / "training_config.json").write_bytes(config.to_json())
    return folder


def write_decoder(folder: Path) -> Path:
    """As `train-decoder` leaves it, as small as the real class can be."""
    sizes = dict(picture_size=4, width=8, num_layers=1, num_heads=1)
    save_decoder(TokenDecoder(DecoderConfig(num_tokens=TOKENS, channels=TARGET, **sizes)), folder)
    return folder


def read_embeddings(path: Path) -> None:
    """Everything that a user does with embeddings before training on them."""
    source = open_embeddings(path)
    source.fetch(range(min(source.num_samples, 100)))
    for record in source.records():
        assert isinstance(record["key"], str) and isinstance(record.get("caption", ""), str | None)
    split_samples(source, eval_split=0.0, seed=0, split_by="key_hash")
    format_inspection(inspect_embeddings(source))


# Pickles


def documented(count: int = 3) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "eva_blip3o_embeddings": generator.normal(size=(count, TOKENS, CONDITION)).astype(np.float16),
        "clip_blip3o_embeddings": torch.randn(count, TOKENS, TARGET),
        "captions": np.array(["a", "b", None], dtype=object)[:count],
        "keys": [f"k{i}" for i in range(count)],
        "config": {"grid": (2, 2), "mean": np.float32(0.25), 3: {"x": {1, 2}}, (1, 2): None},
        "total_samples": count,
    }


def pickles() -> tuple[bytes, ...]:
    """The documented content by every writer that load_pickle knows."""
    content = documented()
    seeds = [pickle.dumps(content, protocol) for protocol in (2, 3, 4, 5)]
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=new)
        seeds.append(buffer.getvalue())
    return tuple(seeds)


def pickle_maker(folder: Path, seed: int) -> Make:
    seeds = pickles()
    boundaries = [[op[2] or 0 for op in pickletools.genops(data)] for data in seeds[:4]]
    file, canary, out = folder / "file.pkl", folder / "canary", folder / "out"

    def content(rng: Random) -> bytes:
        kind = rng.random()
        if kind < 0.55:
            return mutate_bytes(rng.choice(seeds), rng, others=seeds)
        if kind < 0.8:
            return opcode_soup(rng)
        payload = rng.choice(list(HOSTILE.values()))(canary)
        if kind < 0.9:
            return mutate_bytes(payload, rng, others=(*seeds, payload))
        which = rng.randrange(4)  # a payload among honest opcodes, its result thrown away
        at = rng.choice(boundaries[which][1:])
        return seeds[which][:at] + payload[2:-1] + b"0" + seeds[which][at:]

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/pickle/{number}")
        file.write_bytes(content(rng))

        def act() -> None:
            read_embeddings(file)
            convert_pickle(file, out / "store", overwrite=True)

        return Trial(act, file.stat().st_size, folder, outputs=(out,), canary=canary)

    return make


_SOUP_NAMES = (
    *(b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy._core.multiarray\n_reconstruct\n"),
    *(b"cnumpy._core.multiarray\nscalar\n", b"cnumpy._core.numeric\n_frombuffer\n", b"c_codecs\nencode\n"),
    *(b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"ctorch.storage\n_load_from_bytes\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"cbuiltins\nset\n"),
    *(b"cbuiltins\nfrozenset\n", b"cbuiltins\nbytes\n", b"ctorch\nfloat16\n", b"ctorch\nFloatStorage\n"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"iposix\nsystem\n"),
)
_SOUP = (
    *(
        b"N",
        b"]",
        b"}",
        b")",
        b"(",
        b"\x8f",
        b"\x88",
        b"\x89",
        b"K\x01",
        b"K\x02",
        b"K\x00",
        b"J\xff\xff\xff\xff",
    ),
    *(b"\x8a\x09" + b"\xff" * 8 + b"\0", b"G" + struct.pack(">d", 1.5), b"C\x08" + b"\1" * 8, b"X\1\0\0\0a"),
    *(
        b"X\2\0\0\0f4",
        b"X\1\0\0\0<",
        b"X\1\0\0\0C",
        b"X\6\0\0\0latin1",
        b"\x96" + struct.pack("<Q", 4) + b"abcd",
    ),
    *(
        b"a",
        b"e",
        b"s",
        b"u",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x90",
        b"\x91",
        b"l",
        b"d",
        b"0",
        b"1",
        b"2",
    ),
    *(
        b"R",
        b"R",
        b"R",
        b"b",
        b"b",
        b"o",
        b"\x81",
        b"\x92",
        b"\x93",
        b"\x94",
        b"\x94",
        b"h\x00",
        b"h\x01",
        b"h\x02",
    ),
    *(
        b"q\x00",
        b"q\x07",
        b"\x82\xf0",
        b"Q",
        b"Px\n",
        b"\x97",
        b"\x98",
        b"I01\n",
        b"L5L\n",
        b"S'x'\n",
        b"Vx\n",
    ),
)


def opcode_soup(rng: Random) -> bytes:
    """Opcodes at random: most stop early, some build what no writer builds."""
    pieces = rng.choices((*_SOUP, *_SOUP_NAMES), k=rng.randrange(2, 40))
    if rng.random() < 0.3:
        pieces += [
            rng.choice((b"]", b"}", b")", b"(", b"2\x86", b"h\x00h\x00\x86\x94")) * rng.choice((40, 5000))
        ]
    if rng.random() < 0.5:  # a dict that looks like the documented one around it
        pieces = [b"}X\4\0\0\0keys", *pieces, b"s"]
    return b"\x80\x04" + b"".join(pieces) + b"."


# Stores


def manifest_maker(folder: Path, seed: int) -> Make:
    store = write_store(folder / "store")
    original = (store / MANIFEST).read_bytes()
    values = (*HOSTILE_NAMES, "shard-00000.jsonl", "shard-00001.safetensors", "manifest.json", "link")
    (store / "link").symlink_to("/etc/passwd")

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/manifest/{number}")
        parsed = json.loads(original)
        new = mutate_json(parsed, rng, values=values) if rng.random() < 0.75 else mutate_bytes(original, rng)
        (store / MANIFEST).write_bytes(new)
        size = len(new) + sum(file.stat().st_size for file in store.glob("shard-*"))
        return Trial(lambda: read_embeddings(store), size, folder)

    return make


def _sign(store: Path) -> None:
    """Sizes and checksums of the first shard as they are now: damage by somebody who knows the format."""
    manifest = json.loads((store / MANIFEST).read_text())
    entry = manifest["shards"][0]
    for name, digest in (("file", "sha256"), ("table", "table_sha256")):
        entry[digest] = hashlib.sha256((store / entry[name]).read_bytes()).hexdigest()
    entry["bytes"] = (store / entry["file"]).stat().st_size
    (store / MANIFEST).write_text(json.dumps(manifest))


def shard_maker(folder: Path, seed: int) -> Make:
    """Half of them without checksums of samples, which would refuse most other numbers."""
    store, older = write_store(folder / "store"), without_sample_checksums(write_store(folder / "older"))
    shard, manifest = store / "shard-00000.safetensors", store / MANIFEST
    others = tuple(path.read_bytes() for path in (shard, older / shard.name, *store.glob("shard-*1.s*")))
    whole = manifest.read_bytes()

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/shard/{number}")
        shard.write_bytes(mutate_safetensors(others[rng.randrange(2)], rng, others=others))
        manifest.write_bytes(whole)
        if rng.random() < 0.9:
            _sign(store)
        return Trial(lambda: read_embeddings(store), shard.stat().st_size, folder)

    return make


def table_maker(folder: Path, seed: int) -> Make:
    store = write_store(folder / "store")
    table, manifest = store / "shard-00000.jsonl", store / MANIFEST
    original, whole = table.read_bytes(), manifest.read_bytes()

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/table/{number}")
        lines = original.splitlines()
        if rng.random() < 0.75:
            at = rng.randrange(len(lines))
            lines[at] = mutate_json(json.loads(lines[at]), rng)
            table.write_bytes(b"\n".join(lines) + b"\n")
        else:
            table.write_bytes(mutate_bytes(original, rng))
        manifest.write_bytes(whole)
        _sign(store)
        return Trial(lambda: read_embeddings(store), table.stat().st_size, folder)

    return make


# Models


def config_maker(folder: Path, seed: int) -> Make:
    model = write_model(folder / "model")
    file = model / "config.json"
    original = file.read_bytes()
    values = (
        "../x",
        "remote--x.Y",
        "x.y--Z",
        {"AutoModel": "evil.Evil"},
        "ridge",
        "noise",
        "cosine",
        2,
        4,
        8,
    )

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/config/{number}")
        parsed = json.loads(original)
        new = mutate_json(parsed, rng, values=values) if rng.random() < 0.8 else mutate_bytes(original, rng)
        file.write_bytes(new)
        return Trial(lambda: BLIP3oDiTConfig.from_pretrained(model), len(new), folder)

    return make


def training_config_maker(folder: Path, seed: int) -> Make:
    model = write_model(folder / "model")
    file = model / "training_config.json"
    original = file.read_bytes()

    def act() -> None:
        config = TrainingConfig.from_folder(model)
        with error_context(file):  # sizes that do not fit each other are found when the model is built
            config.model(num_tokens=4, condition_dim=CONDITION, target_dim=TARGET)

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/training_config/{number}")
        parsed = json.loads(original)
        new = mutate_json(parsed, rng) if rng.random() < 0.8 else mutate_bytes(original, rng)
        file.write_bytes(new)
        return Trial(act, len(new), folder)

    return make


def model_maker(folder: Path, seed: int) -> Make:
    """Weights and configuration together, and files that transformers would look for beside them."""
    model, store = write_model(folder / "model"), write_store(folder / "store")
    canary = folder / "canary"
    files = {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors", EMA_FILE)}
    weights = (files["model.safetensors"], files[EMA_FILE])
    strangers = ("pytorch_model.bin", "adapter_config.json", "model.safetensors.index.json")
    evil = HOSTILE["os.system by GLOBAL"](canary)

    def act() -> None:
        inference = BLIP3oInference(model, device="cpu")
        eva, _ = inference.open(store).fetch([0])
        inference.generate(eva, inference.model.config.flow.student_steps or 1, solver="euler")

    def damage(rng: Random) -> None:
        kind = rng.random()
        if kind < 0.65:
            name = rng.choice(("model.safetensors", EMA_FILE))
            (model / name).write_bytes(mutate_safetensors(files[name], rng, others=weights))
        elif kind < 0.9:
            (model / "config.json").write_bytes(
                mutate_json(json.loads(files["config.json"]), rng, values=(2, 3))
            )
        else:
            (model / rng.choice(strangers)).write_bytes(
                rng.choice(
                    (evil, b"{}", b'{"weight_map": {"x": "../../etc/passwd"}}', b'{"peft_type": "LORA"}')
                )
            )
            for name in rng.sample(("model.safetensors", EMA_FILE), rng.randrange(3)):
                (model / name).unlink()

    def make(number: int) -> Trial:
        for name in strangers:
            (model / name).unlink(missing_ok=True)
        for name, content in files.items():
            (model / name).write_bytes(content)
        damage(Random(f"{seed}/model/{number}"))
        size = sum(file.stat().st_size for file in model.iterdir())
        return Trial(act, size, folder, canary=canary, slack=256 << 20)

    return make


# Pictures to extract from


def write_tar(path: Path, names: tuple[str, ...]) -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = picture.getvalue() if name.endswith(".png") else b'{"caption": "x"}'
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def pictures_maker(folder: Path, seed: int) -> Make:
    """List files and webdataset tars, as they are listed and read before any tower runs."""
    plain = write_tar(folder / "seed.tar", ("a/0.png", "a/0.json", "1.png", "1.txt", "1.cls"))
    evil = write_tar(folder / "evil.tar", ("../../x.png", "../../x.json", "/abs.png", "a/../b.png", "..png"))
    lines = b'{"path": "a.png", "caption": "x", "label": 1, "key": "k"}\n{"image": "../b.png"}\n'
    table = b"path,caption,key,label\na.png,x,k,1\n../b.png,y,l,2\n"
    seeds = {".tar": (plain, evil), ".jsonl": (lines,), ".csv": (table,), ".tsv": (b"a.png\tx\n/b.png\ty\n",)}

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/pictures/{number}")
        suffix = rng.choice((".tar", ".tar", ".jsonl", ".csv", ".tsv"))
        file = folder / f"list{suffix}"
        if suffix == ".jsonl" and rng.random() < 0.7:
            row = {"path": "a.png", "caption": "x", "label": 1, "key": "k"}
            file.write_bytes(mutate_json(row, rng) + b"\n")
        else:
            file.write_bytes(mutate_bytes(rng.choice(seeds[suffix]), rng, others=seeds[suffix]))

        def act() -> None:
            for ref in itertools.islice(list_images(file), 20):
                try:
                    decode_image(ref.read())
                except (UnreadableImageError, OSError, ValueError):
                    continue  # what becomes a line of skipped.jsonl

        return Trial(act, file.stat().st_size, folder)

    return make
