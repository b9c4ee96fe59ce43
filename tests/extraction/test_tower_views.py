"""Pictures beside token maps: the part that each tower saw, by a name that says whose it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip3o_dit.extraction.preprocessing import Preprocessing
from blip3o_dit.extraction.tower_views import tower_views

EVA, CLIP = "picture, as EVA saw it", "picture, as CLIP saw it"
SHORTEST, SQUASH = Preprocessing(64), Preprocessing(32, "squash")


def manifest(eva: Any, clip: Any) -> dict[str, Any]:
    def described(found: Any) -> Any:
        return found.describe() if isinstance(found, Preprocessing) else found

    sides = {"eva": {"preprocessing": described(eva)}, "clip": {"preprocessing": described(clip)}}
    return {"encoders": sides}


def red_share(image: Image.Image) -> float:
    return float((np.asarray(image)[..., 0] > 127).mean())


@pytest.fixture
def wide() -> Image.Image:
    """A third of it, in the middle, is red."""
    picture = Image.new("RGB", (900, 300), "blue")
    picture.paste("red", (300, 0, 600, 300))
    return picture


@pytest.mark.parametrize(
    ("eva", "clip", "expected"),
    [
        (SHORTEST, Preprocessing(224), {"picture": 1.0}),
        (SQUASH, Preprocessing(64, "squash"), {"picture": 1 / 3}),
        (SHORTEST, SQUASH, {EVA: 1.0, CLIP: 1 / 3}),
        (SHORTEST, Preprocessing(64, resize_to=96), {EVA: 1.0, CLIP: 1.0}),
        (Preprocessing(64, resize_to=64), SHORTEST, {"picture": 1.0}),
        (Preprocessing(600, "crop"), Preprocessing(300, "crop"), {EVA: 1 / 4, CLIP: 1.0}),
        (SHORTEST, None, {EVA: 1.0, "whole picture": 1 / 3}),
        (None, None, {"whole picture": 1 / 3}),
        ({"size": -1, "resize": "shortest"}, {"size": True, "resize": "squash"}, {"whole picture": 1 / 3}),
        ({"size": 64, "resize": "shortest", "resize_to": 10**9}, "x", {"whole picture": 1 / 3}),
    ],
)
def test_the_view_is_what_the_tower_saw(eva: Any, clip: Any, expected: Any, wide: Image.Image) -> None:
    found = tower_views(manifest(eva, clip))(wide)
    assert {name: red_share(image) for name, image in found.items()} == {
        name: pytest.approx(share, abs=0.02) for name, share in expected.items()
    }
    assert wide.size == (900, 300)  # left as it is


@pytest.mark.parametrize("known", [Preprocessing(48), Preprocessing(48, resize_to=56), SQUASH])
def test_it_is_the_towers_own_input_in_another_size(known: Preprocessing) -> None:
    """Checked on smooth pictures, which do not depend on the size that they are scaled to."""
    for size in ((160, 90), (90, 160), (100, 100)):
        y, x = np.mgrid[0 : size[1], 0 : size[0]].astype(float)
        values = np.stack([255 * x / size[0], 255 * y / size[1], 0 * x], axis=-1).astype(np.uint8)
        picture = Image.fromarray(values)
        seen = Image.fromarray(known.pixels(picture).permute(1, 2, 0).numpy())
        view = tower_views(manifest(known, known))(picture)["picture"]
        difference = np.asarray(view.resize(seen.size)).astype(float) - np.asarray(seen)
        assert np.abs(difference)[2:-2, 2:-2].max() < 6


@pytest.mark.parametrize("manifest", [{}, {"encoders": 5}, {"encoders": {"eva": 5, "clip": {}}}])
def test_embeddings_that_say_nothing(manifest: dict[str, Any], wide: Image.Image) -> None:
    (view,) = tower_views(manifest)(wide).items()
    assert view[0] == "whole picture" and view[1].size == (448, 149)
