"""The digits demo's towers and its figure: what they promise, with a few training steps only."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from blip3o_dit.utils.pca_colors import pca_colors
from examples.digits import towers
from examples.digits.demo import extract_store
from examples.digits.figure import draw_demo_figure
from examples.digits.towers import (
    ClipTower,
    EvaTower,
    digit_tokens,
    digit_towers,
    encode,
    load_digit_pictures,
    pixel_blocks,
    pool_2x2,
    redundancy,
    train_tower,
)

TRAIN = np.arange(0, 1797, 2)
TOWERS = [ClipTower, EvaTower]


@pytest.fixture(scope="module")
def digits():
    return load_digit_pictures()


@pytest.fixture(scope="module")
def tokens():
    return digit_tokens(TRAIN, progress=False, steps=1)


@pytest.fixture
def few_digits(digits, monkeypatch):
    """Only 200 digits, for speed."""
    pictures, labels = digits
    monkeypatch.setattr(towers, "load_digit_pictures", lambda: (pictures[:200], labels[:200]))


def test_pictures_are_the_digits_enlarged(digits):
    pictures, labels = digits
    assert pictures.shape == (1797, 32, 32, 3) and pictures.dtype == np.uint8
    assert labels.shape == (1797,) and labels.dtype == np.int64
    assert sorted(set(labels)) == list(range(10))
    assert pictures.min() == 0 and pictures.max() == 255
    # Averaged back to 8x8 they are the originals, but for what bicubic interpolation smooths.
    original = towers.load_digits().images / 16
    shrunk = pictures[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)) / 255
    assert np.corrcoef(original.ravel(), shrunk.ravel())[0, 1] > 0.98


def test_shapes_and_types(tokens):
    assert tokens.condition.shape == (1797, 16, 64) and tokens.condition.dtype == torch.float32
    assert tokens.target.shape == (1797, 16, 48) and tokens.target.dtype == torch.float32
    assert tokens.pictures.shape == (1797, 32, 32, 3) and tokens.labels.shape == (1797,)
    assert tokens.condition.isfinite().all() and tokens.target.isfinite().all()


def test_tokens_can_be_trained_on(tokens):
    layer = torch.nn.Linear(64, 48)
    (layer(tokens.condition[:2]) - tokens.target[:2]).square().mean().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_the_seed_decides_and_neither_the_random_state_nor_the_order(few_digits):
    torch.manual_seed(1)
    tokens = digit_tokens(range(0, 150, 2), seed=3, progress=False, steps=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = digit_tokens(range(148, -1, -2), seed=3, progress=False, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.condition, tokens.condition)
    assert torch.equal(again.target, tokens.target)
    other = digit_tokens(range(0, 150, 2), seed=4, progress=False, steps=3)
    assert not torch.allclose(other.condition, tokens.condition, atol=1e-2)
    assert not torch.allclose(other.target, tokens.target, atol=1e-2)


def test_held_out_pictures_have_no_influence(digits, monkeypatch):
    pictures, labels = digits
    held_out = np.setdiff1d(np.arange(1797), TRAIN)
    noise = np.random.default_rng(0).integers(0, 256, pictures[held_out].shape, dtype=np.uint8)
    changed_out, changed_in = pictures.copy(), pictures.copy()
    changed_out[held_out] = noise
    changed_in[TRAIN] = 255 - pictures[TRAIN]
    new_labels = labels.copy()
    new_labels[held_out] = 9 - labels[held_out]

    weights = _weights_after_training(pictures, labels, monkeypatch)
    assert _equal(weights, _weights_after_training(changed_out, new_labels, monkeypatch))
    assert not _equal(weights, _weights_after_training(changed_in, labels, monkeypatch))


def _weights_after_training(pictures, labels, monkeypatch):
    """Both towers' weights after digit_tokens on these pictures, instead of scikit-learn's."""
    trained = []

    def keep(tower, *args, **kwargs):
        trained.append(tower)
        return torch.zeros(0)

    with monkeypatch.context() as patch:
        patch.setattr(towers, "load_digit_pictures", lambda: (pictures, labels))
        patch.setattr(towers, "encode", keep)
        digit_tokens(TRAIN, seed=0, progress=False, steps=2)
    assert len(trained) == 2
    return [value for tower in trained for value in tower.state_dict().values()]


def _equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("indices", [[], [0, 1797], [-1, 2], [3, 3], [0.0, 1.0], [True, False], [[1, 2]]])
def test_indices_that_make_no_sense_are_refused(indices):
    with pytest.raises(ValueError, match="train_indices: expected"):
        digit_tokens(indices, progress=False, steps=1)


def test_pooling_is_the_row_major_2x2_mean():
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    patches = torch.stack([row, column], dim=-1).reshape(1, 64, 2)  # each knows where it is
    pooled = pool_2x2(patches)[0]
    expected = [[2 * (k // 4) + 0.5, 2 * (k % 4) + 0.5] for k in range(16)]
    assert torch.equal(pooled, torch.tensor(expected))


@pytest.mark.parametrize("tower_class", TOWERS)
@pytest.mark.parametrize(("row", "column"), [(0, 3), (3, 0), (1, 2)])
def test_each_token_stands_for_its_own_part_of_the_picture(tower_class, row, column):
    blank = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    marked = blank.copy()
    marked[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
    tower = tower_class(seed=0)
    change = (encode(tower, marked) - encode(tower, blank)).norm(dim=-1)[0]  # [16]
    assert change.argmax() == 4 * row + column


def test_pixel_blocks_are_row_major_like_the_tokens():
    pixels = torch.arange(32 * 32.0).reshape(1, 1, 32, 32).expand(1, 3, 32, 32)
    blocks = pixel_blocks(pixels)[0]  # [16, 64]
    for token in range(16):
        row, column = 8 * (token // 4), 8 * (token % 4)
        assert torch.equal(blocks[token], pixels[0, 0, row : row + 8, column : column + 8].flatten())


def test_redundancy_of_equal_and_of_unrelated_channels():
    generator = torch.Generator().manual_seed(0)
    channel = torch.randn(64, 16, 1, generator=generator)
    assert redundancy(channel.expand(64, 16, 5)).item() == pytest.approx(4.0, abs=1e-4)
    assert redundancy(torch.randn(64, 16, 5, generator=generator)).item() < 0.02
    # A channel cannot look new by carrying its position.
    positions = torch.randn(1, 16, 5, generator=generator)
    assert redundancy(channel + 100 * positions).item() == pytest.approx(4.0, abs=1e-2)


def test_clip_tokens_have_been_through_the_final_norm(digits):
    tower = ClipTower(seed=0)
    scaled = ClipTower(seed=0)
    with torch.no_grad():
        scaled.vision.vision_model.post_layernorm.weight.mul_(2)
    pictures = digits[0][:4]
    torch.testing.assert_close(encode(scaled, pictures), 2 * encode(tower, pictures))


@pytest.mark.parametrize("tower_class", TOWERS)
def test_training_lowers_the_loss(tower_class, digits, monkeypatch):
    losses = []
    tower_loss = towers._tower_loss

    def keep(*args):
        losses.append(tower_loss(*args))
        return losses[-1]

    monkeypatch.setattr(towers, "_tower_loss", keep)
    tower = tower_class(seed=0)
    train_tower(tower, digits[0][TRAIN], digits[1][TRAIN], seed=0, steps=12, progress=False)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])
    assert not tower.training


@pytest.mark.parametrize("tower_class", TOWERS)
def test_the_batch_size_does_not_change_tokens(tower_class, digits):
    tower, pictures = tower_class(seed=0), digits[0][:20]
    torch.testing.assert_close(
        encode(tower, pictures), encode(tower, pictures, batch_size=7), rtol=1e-4, atol=1e-5
    )


def test_colours_depend_on_the_true_tokens_alone():
    rng = np.random.default_rng(0)
    true, other = rng.normal(size=(3, 16, 48)), rng.normal(size=(3, 16, 48))
    colours = pca_colors(true, true)
    assert colours.shape == (3, 16, 3) and colours.min() >= 0 and colours.max() <= 1
    mixed = pca_colors(np.concatenate([other, true]), true)
    np.testing.assert_allclose(mixed[3:], colours)
    # The centre of the true tokens is mid-grey.
    np.testing.assert_allclose(pca_colors(true.mean(axis=(0, 1)), true), 0.5)


def test_figure_is_a_png_as_wide_as_promised(tmp_path):
    path = tmp_path / "demo.png"
    draw_demo_figure(path, **_figure_inputs())
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 20_000
    image = imread(path)
    assert image.shape[:2] == (1200, 1600)
    assert image[..., :3].std() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 2]}, "expected 3 pictures and labels"),
        ({"pictures": np.zeros((2, 32, 32, 3), np.uint8)}, "expected 3 pictures and labels"),
        ({"rows": {}}, "expected at least the true tokens"),
        ({"decoded": {"DiT": np.zeros((3, 32, 32, 3), np.uint8)}}, "decoded: expected 3 pictures of each"),
        ({"rows": {"true": np.zeros((3, 15, 48))}}, "N a square"),
        (
            {"rows": {"true": np.zeros((3, 16, 48)), "ridge": np.zeros((3, 16, 64))}},
            "'ridge'.*expected",
        ),
    ],
)
def test_figure_refuses_inputs_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        draw_demo_figure(tmp_path / "demo.png", **{**_figure_inputs(), **change})
    assert not (tmp_path / "demo.png").exists()


def _figure_inputs():
    rng = np.random.default_rng(0)
    names = ("true CLIP tokens", "DiT", "ridge")
    return {
        "pictures": rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8),
        "labels": [4, 0, 7],
        "rows": {name: rng.normal(size=(3, 16, 48)) for name in names},
        "decoded": {name: rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8) for name in names},
        "training_curve": {"training": (np.arange(1, 50), 1 / np.arange(1, 50))},
        "metrics": {
            "true CLIP tokens": {"digit accuracy": 0.98},
            "DiT": {"token cosine": 0.9, "R2": -0.3, "digit accuracy": 0.9},
        },
        "title_note": "made up",
    }


def test_saved_towers_give_the_same_tokens_through_the_extraction_engine(tmp_path: Path) -> None:
    pictures, labels = load_digit_pictures()
    shown, captions = pictures[:40], labels[:40]
    trained = digit_towers(shown, captions, range(20), progress=False, steps=2)
    store = extract_store(tmp_path, shown, captions, trained)
    found = store.fetch(range(40))
    for tower, tokens in zip(trained, found, strict=True):
        torch.testing.assert_close(tokens, encode(tower, shown), rtol=2e-3, atol=2e-3)  # float16 on disk
    assert store.records([3])[0] == {
        "key": "digit-0003.png",
        "caption": f"a handwritten {captions[3]}",
        "label": str(captions[3]),
    }
    assert store.manifest["pooling"] == "eva 8x8 -> 4x4 mean, clip 8x8 -> 4x4 mean"
