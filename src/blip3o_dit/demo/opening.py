"""From names to a `Demo`: model, store, towers and decoder opened and checked, what is missing noted."""

from __future__ import annotations

import logging

from blip3o_dit.data.towers import read_towers
from blip3o_dit.decoder.decode import check_fits
from blip3o_dit.decoder.folder import load_decoder
from blip3o_dit.demo.answers import Demo
from blip3o_dit.demo.config import DemoConfig
from blip3o_dit.demo.gallery import Gallery
from blip3o_dit.evaluation.decoded import check_made_for
from blip3o_dit.extraction.conditions import FROM_SCRATCH, open_tower
from blip3o_dit.extraction.shown_images import pictures_of_store
from blip3o_dit.extraction.vision_towers import VisionEncoder
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.utils.json_files import one_line
from blip3o_dit.utils.validation import is_hub_id

logger = logging.getLogger(__name__)


def open_demo(inference: BLIP3oInference, config: DemoConfig) -> Demo:
    """The demo of a model.

    A store can do without the tower of the conditions, pictures without that of the targets: what is missing
    is then said on the page, unless it was named.

    Raises:
        FileNotFoundError, ValueError: one line: what does not fit the model, or cannot be loaded.
    """
    notes: list[str] = []
    gallery = decoder = None
    if config.decoder is None:
        notes.append("No tokens as pictures: no decoder was named (--decoder).")
    else:
        decoder = load_decoder(config.decoder, inference.device)
        tokens, _, width = inference.model.config.data_sizes
        check_fits(decoder, tokens, width, inference.model_path)
        check_made_for(decoder, inference)
    eva = _tower(inference, "eva", config.eva, notes, needed=config.embeddings_path is None)
    clip = _tower(inference, "clip", config.clip, notes) if eva else None
    if config.embeddings_path is None:
        notes.append("No samples to pick and no nearest ones: no store was named (--embeddings_path).")
    else:
        source = inference.open(config.embeddings_path)
        shown = pictures_of_store(getattr(source, "manifest", {}), config.pictures)
        gallery = Gallery(inference, source, config.split, shown)
    return Demo(inference, eva, clip, gallery, decoder, notes)


def _tower(
    inference: BLIP3oInference, side: str, name: str | None, notes: list[str], *, needed: bool = False
) -> VisionEncoder | None:
    """The tower of a side; None, with a note, for one that was not asked for and cannot be opened.

    Nothing is downloaded that was not named.
    """
    folder, sizes = inference.model_path, inference.model.config.data_sizes
    try:
        recorded = read_towers(folder) or {"encoders": {}}
        known = (recorded["encoders"].get(side) or {}).get("name", "")
        if name is None and is_hub_id(known) and not FROM_SCRATCH.fullmatch(known):
            raise ValueError(f"its tower {known} is on the hub: name it with --{side}")
        return open_tower(recorded, sizes, folder, side=side, name=name, device=inference.device)
    except (OSError, ValueError) as error:
        if needed or name is not None:
            raise
        missing = "No pictures of yours" if side == "eva" else "No true tokens of your pictures"
        notes.append(f"{missing}: {one_line(error)}.")
        logger.warning("%s", notes[-1])
        return None
