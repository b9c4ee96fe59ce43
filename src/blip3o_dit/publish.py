"""A model, a decoder or an embedding store sent to the Hugging Face hub, with a card, or to an address.

Of a model's folder go its weights, configuration, settings and checksums, of a checkpoint no optimizer; the
evaluation's report goes along where there is one. A store becomes a data set.
"""

from __future__ import annotations

import logging
from fnmatch import fnmatch
from pathlib import Path

from blip3o_dit.data.manifest import MANIFEST
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.utils.addresses import located
from blip3o_dit.utils.checksums import CHECKSUMS_FILE, digests_of, sha256
from blip3o_dit.utils.hub import CARD_FILE, MODEL_FILES, RAW, Repository
from blip3o_dit.utils.json_files import printable
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.recognise import MODEL, recognise, refusal
from blip3o_dit.utils.sending import send_folder

logger = logging.getLogger(__name__)

_OF_A_MODEL = (*MODEL_FILES, RAW, "metrics.json", "report.html", "training_log.jsonl", "training_curves.png")
_SENT = ("model", "checkpoint", "decoder", "store")
_OF_A_STORE = (MANIFEST, "shard-*", "skipped.jsonl")


def push_to_hub(
    folder: str | Path, repository: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Send a model, a decoder or an embedding store to the hub; returns the address of its page.

    A README.md in the folder is its card (`evaluate` writes one); without any a short one is made.

    Args:
        folder: of a training run, a checkpoint, a distilled model, a decoder, or a store.
        repository: `owner/name`, made if it is not there.
        private: of a new repository.
        revision: a branch (default: main).

    Raises:
        FileNotFoundError, ValueError: one line: neither model nor whole store there, or the hub refuses.
    """
    folder = Path(folder)
    kind = recognise(folder).kind
    if kind not in _SENT:
        raise refusal(folder, MODEL)
    is_store = kind == "store"
    patterns = _OF_A_STORE if is_store else _OF_A_MODEL
    if is_store:
        card = store_card(EmbeddingStore(folder), repository)
    else:
        card = decoder_card(repository) if kind == "decoder" else model_card(repository)
    there = Repository(
        repository, kind="dataset" if is_store else "model", private=private, revision=revision
    )
    return there.send(folder, patterns, card=card, message=f"{folder.resolve().name}, by blip3o-dit")


def push_to_address(folder: str | Path, address: str | Path, *, overwrite: bool = False) -> str:
    """Send a model, a decoder or a store to `s3://bucket/place`, or wherever else fsspec writes; returns it.

    What is there already with the right checksums is not sent again. The store's manifest, or the model's
    checksums, go last: until then nothing there passes for whole.

    Raises:
        FileNotFoundError, ValueError: one line: neither model nor whole store here, or another one there
            without `overwrite`. ReadError: the connection is lost.
    """
    folder = Path(folder)
    kind = recognise(folder).kind
    if kind not in _SENT:
        raise refusal(folder, MODEL)
    if kind == "store":
        shards = EmbeddingStore(folder).manifest["shards"]
        known = {entry["file"]: entry["sha256"] for entry in shards}
        known |= {entry["table"]: entry["table_sha256"] for entry in shards}
        last, more = MANIFEST, [name for name in ("skipped.jsonl", CARD_FILE) if (folder / name).is_file()]
    else:
        files = [file.name for file in folder.iterdir() if file.is_file()]
        known, last = {}, CHECKSUMS_FILE if CHECKSUMS_FILE in files else "config.json"
        more = [
            name
            for name in files
            if name != last and any(fnmatch(name, pattern) for pattern in (*_OF_A_MODEL, CARD_FILE))
        ]
    known |= digests_of(folder, more) if kind != "store" else {name: sha256(folder / name) for name in more}
    with working(f"sending {folder} to {located(address)}"):
        sent = send_folder(folder, known, last, located(address), overwrite=overwrite)
    logger.info("%d of %d files were sent", sent, len(known))
    return str(located(address))


def model_card(name: str) -> str:
    """The card of a model that was not evaluated."""
    return f"""---
library_name: blip3o-dit
tags: [flow-matching, diffusion-transformer, embeddings]
---

# {printable(name)}

A diffusion transformer trained by flow matching to generate CLIP tokens from EVA-CLIP tokens, by blip3o-dit.
How good it is has not been measured: `blip3o-dit evaluate` does, and writes a card with what it found.

```python
from blip3o_dit import BLIP3oInference

inference = BLIP3oInference("{printable(name)}")
clip = inference.generate(eva_embeddings)
```
"""


def decoder_card(name: str) -> str:
    """The card of a decoder."""
    return f"""---
library_name: blip3o-dit
tags: [embeddings, decoder]
---

# {printable(name)}

A small network that turns CLIP tokens into pictures, by blip3o-dit.

```bash
blip3o-dit decode {printable(name)} embeddings/store pictures
```
"""


def store_card(store: EmbeddingStore, name: str) -> str:
    """The card of a store: what its manifest says."""
    towers = {side: about.get("name") for side, about in (store.manifest.get("encoders") or {}).items()}
    listed = "\n".join(f"* {side}: {printable(name)}" for side, name in towers.items() if name)
    return f"""---
library_name: blip3o-dit
tags: [embeddings, clip, eva-clip]
---

# {printable(name)}

An embedding store of blip3o-dit: {store.num_samples:,} samples, each with {store.num_tokens} condition
tokens of {store.condition_dim} numbers (`eva`) and as many target tokens of {store.target_dim} (`clip`).

{listed}

```bash
hf download {printable(name)} --repo-type dataset --local-dir store
blip3o-dit train --embeddings_path store --output_dir checkpoints/run
```
"""
