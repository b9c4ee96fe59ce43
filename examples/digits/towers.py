"""Two small vision towers, trained here, that describe the same handwritten digits differently.

They stand in for CLIP and EVA-CLIP, so that the demo needs no download. The architectures are the real
ones with tiny sizes, saved as checkpoints that the extraction loads like any other, and tokens are those
of the real towers: patch tokens (CLS dropped) -> final norm -> visual projection -> 2x2 mean. Here the
mean turns 8x8 patches into 4x4 tokens.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from blip3o_dit.extraction.eva_clip import EvaClipConfig, EvaClipVision

PICTURE_SIZE = 32
PATCH_SIZE = 4
TOKEN_GRID = 4  # tokens per side, after the 2x2 mean
N_CLASSES = 10
BATCH_SIZE = 64
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class DigitTokens:
    """Every digit and what the two towers say about it; all four share their first axis.

    pictures: uint8 [1797, 32, 32, 3]; labels: int64 [1797].
    condition: float32 [1797, 16, 64], the EVA side; target: float32 [1797, 16, 48], the CLIP side.
    """

    pictures: np.ndarray
    labels: np.ndarray
    condition: Tensor
    target: Tensor


def digit_tokens(
    train_indices: Sequence[int] | np.ndarray | Tensor,
    *,
    seed: int = 0,
    progress: bool = True,
    steps: int = 250,
) -> DigitTokens:
    """Train both towers on the digits at `train_indices` and on no other, then encode all digits.

    train_indices: distinct integers into the 1797 digits; their order does not matter.
    steps: training steps for each tower. The same seed and thread count give the same tokens on one
    machine.

    Raises ValueError when an index is no integer, out of range or there twice.
    """
    pictures, labels = load_digit_pictures()
    towers = digit_towers(pictures, labels, train_indices, seed=seed, progress=progress, steps=steps)
    condition, target = (encode(tower, pictures, progress=progress) for tower in towers)
    return DigitTokens(pictures, labels, condition=condition, target=target)


def digit_towers(
    pictures: np.ndarray,
    labels: np.ndarray,
    train_indices: Sequence[int] | np.ndarray | Tensor,
    *,
    seed: int = 0,
    progress: bool = True,
    steps: int = 250,
) -> tuple["EvaTower", "ClipTower"]:
    """Both towers, trained on the digits at `train_indices` and on no other; see `digit_tokens`."""
    train = _checked_indices(train_indices, len(pictures))
    eva, clip = EvaTower(seed=2 * seed), ClipTower(seed=2 * seed + 1)
    for number, tower in enumerate((eva, clip)):  # they share neither first weights nor batch order
        train_tower(
            tower, pictures[train], labels[train], seed=2 * seed + number, steps=steps, progress=progress
        )
    return eva, clip


def load_digit_pictures() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, enlarged: pictures uint8 [1797, 32, 32, 3] and labels int64 [1797]."""
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], from 0..16
    pictures = np.stack([_enlarged(picture) for picture in grey])  # [1797, 32, 32, 3]
    return pictures, digits.target.astype(np.int64)


class ClipTower(nn.Module):
    """The target side: a CLIP vision transformer and its projection to 48 numbers a token."""

    name = "CLIP"
    width = 48
    # How it is trained (see `train_tower`): more on which digit it is, less on the strokes.
    pixel_weight = 0.5
    spread_weight = 0.3
    max_shift = 2.0
    max_degrees = 5.0

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            image_size=PICTURE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=self.width,
        )
        with _seeded(seed):
            self.vision = CLIPVisionModelWithProjection(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: float32 [B, 3, 32, 32] in -1..1 -> tokens [B, 16, 48]."""
        vision = self.vision.vision_model
        patches = vision(pixel_values=pixels).last_hidden_state[:, 1:]  # [B, 64, 64]
        # CLIP's forward norms only the pooled CLS: last_hidden_state comes without the final norm.
        patches = vision.post_layernorm(patches)
        return pool_2x2(self.vision.visual_projection(patches))  # [B, 16, 48]


class EvaTower(nn.Module):
    """The condition side: EVA-CLIP's vision transformer, projected to 64 numbers a token."""

    name = "EVA"
    width = 64
    # How it is trained: closer to the strokes, on pictures that are moved and turned further.
    pixel_weight = 2.0
    spread_weight = 0.1
    max_shift = 3.0
    max_degrees = 12.0

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        config = EvaClipConfig(
            image_size=PICTURE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            projection_dim=self.width,
        )
        with _seeded(seed):
            self.vision = EvaClipVision(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: float32 [B, 3, 32, 32] in -1..1 -> tokens [B, 16, 64]."""
        return pool_2x2(self.vision(pixels))  # [B, 64, 64] -> [B, 16, 64]


def save_tower(tower: ClipTower | EvaTower, folder: Path) -> None:
    """A checkpoint folder as the published ones: config, safetensors, preprocessing."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tower, ClipTower):
        tower.vision.save_pretrained(folder)
    else:
        config = asdict(tower.vision.config)
        named = {"architectures": ["EvaCLIPModel"], "projection_dim": config.pop("projection_dim")}
        (folder / "config.json").write_text(json.dumps({**named, "vision_config": config}, indent=2))
        save_file(tower.vision.state_dict(), folder / "model.safetensors")
    half = [0.5, 0.5, 0.5]
    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    preprocessing = {"size": size, "resample": 0, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2))


def pool_2x2(tokens: Tensor) -> Tensor:
    """Mean of each 2x2 neighbourhood: row-major 8x8 [B, 64, W] -> row-major 4x4 [B, 16, W]."""
    batch, _, width = tokens.shape
    grid = tokens.reshape(batch, TOKEN_GRID, 2, TOKEN_GRID, 2, width)  # [B, 4, 2, 4, 2, W]
    return grid.mean(dim=(2, 4)).flatten(1, 2)  # [B, 16, W]


def train_tower(
    tower: ClipTower | EvaTower,
    pictures: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    steps: int,
    progress: bool,
) -> None:
    """Train the tower in place on these pictures, and leave it in evaluation mode.

    pictures: uint8 [n, 32, 32, 3]; labels: int64 [n].
    """
    pixels, digits = _to_pixels(pictures), torch.from_numpy(labels)
    tower.train()
    with _seeded(seed):
        # Two linear heads, thrown away afterwards: linear, so that the tokens have to be plain.
        name_digit = nn.Linear(tower.width, N_CLASSES)
        redraw = nn.Linear(tower.width, (PICTURE_SIZE // TOKEN_GRID) ** 2)
        parameters = [*tower.parameters(), *name_digit.parameters(), *redraw.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.15
        )
        for _ in trange(steps, desc=f"training the {tower.name} tower", disable=not progress):
            batch = torch.randint(len(pixels), (BATCH_SIZE,))
            seen = _moved(pixels[batch], tower.max_shift, tower.max_degrees)  # [B, 3, 32, 32]
            loss = _tower_loss(tower, name_digit, redraw, seen, digits[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    tower.eval()


def _tower_loss(
    tower: ClipTower | EvaTower,
    name_digit: nn.Linear,
    redraw: nn.Linear,
    pixels: Tensor,
    digits: Tensor,
) -> Tensor:
    """What makes the tokens worth generating, for pixels [B, 3, 32, 32] and digits [B].

    The mean token has to name the digit, so that the tokens mean something together; each token has
    to redraw the pixels under it, so that it means something where it stands; and the channels have
    to differ, or ten directions out of 48 would carry 99 % of the CLIP side's variance.
    """
    tokens = tower(pixels)  # [B, 16, W]
    digit_loss = F.cross_entropy(name_digit(tokens.mean(dim=1)), digits)
    pixel_loss = F.mse_loss(redraw(tokens), pixel_blocks(pixels))
    return digit_loss + tower.pixel_weight * pixel_loss + tower.spread_weight * redundancy(tokens)


def pixel_blocks(pixels: Tensor) -> Tensor:
    """The grey pixels under each token, row-major as the tokens: [B, 3, 32, 32] -> [B, 16, 64]."""
    side = PICTURE_SIZE // TOKEN_GRID
    blocks = F.unfold(pixels[:, :1], side, stride=side)  # all channels are equal; [B, 64, 16]
    return blocks.transpose(1, 2)  # [B, 16, 64]


def redundancy(tokens: Tensor) -> Tensor:
    """How much the channels of [B, N, W] repeat one another: 0 when uncorrelated, W - 1 when equal.

    It is the squared correlation with all other channels, summed, then averaged over the channels.
    """
    # Centred per position, so that channels cannot look different by merely telling where they are.
    centred = (tokens - tokens.mean(dim=0)).flatten(0, 1)  # [B * N, W]
    unit = F.normalize(centred, dim=0)
    correlation = unit.T @ unit  # [W, W]
    return (correlation - torch.diag(correlation.diagonal())).square().sum(dim=1).mean()


def encode(
    tower: ClipTower | EvaTower,
    pictures: np.ndarray,
    batch_size: int = 256,
    *,
    progress: bool = False,
) -> Tensor:
    """pictures: uint8 [n, 32, 32, 3] -> the tower's tokens, float32 [n, 16, width]."""
    tower.eval()
    starts = trange(0, len(pictures), batch_size, desc=f"{tower.name} tokens", disable=not progress)
    with torch.inference_mode():
        tokens = [tower(_to_pixels(pictures[start : start + batch_size])) for start in starts]
    # Joined out here because autograd refuses tensors made in inference mode, even as inputs.
    return torch.cat(tokens)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws inside follow the seed; the caller's random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs as well
        yield


def _checked_indices(indices: Sequence[int] | np.ndarray | Tensor, n_pictures: int) -> np.ndarray:
    """The indices as int64 [n], sorted so that training follows the set and not its order."""
    given = np.asarray(indices)
    if given.ndim != 1 or given.size == 0 or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            "train_indices: expected a non-empty list of integers, "
            f"found {given.dtype} of shape {given.shape}"
        )
    if given.min() < 0 or given.max() >= n_pictures:
        raise ValueError(f"train_indices: expected 0..{n_pictures - 1}, found {given.min()}..{given.max()}")
    distinct = np.unique(given).astype(np.int64)
    if len(distinct) != len(given):
        raise ValueError(
            f"train_indices: expected distinct indices, found {len(given)} with {len(distinct)} distinct ones"
        )
    return distinct


def _enlarged(grey: np.ndarray) -> np.ndarray:
    """One grey picture uint8 [8, 8] -> RGB uint8 [32, 32, 3]."""
    picture = Image.fromarray(grey).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(picture.convert("RGB"))


def _to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [n, 32, 32, 3] -> float32 [n, 3, 32, 32] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _moved(pixels: Tensor, max_shift: float, max_degrees: float) -> Tensor:
    """Each picture [B, 3, 32, 32] shifted (in pixels) and turned at random, within the limits."""
    batch = len(pixels)
    angle = torch.deg2rad((2 * torch.rand(batch) - 1) * max_degrees)  # [B]
    # affine_grid counts in half-widths: the picture spans -1..1.
    shift = (2 * torch.rand(batch, 2) - 1) * max_shift * 2 / PICTURE_SIZE  # [B, 2]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)  # [B, 4]
    motion = torch.cat([turn.reshape(batch, 2, 2), shift[:, :, None]], dim=2)  # [B, 2, 3]
    grid = F.affine_grid(motion, list(pixels.shape), align_corners=False)
    # What comes in from outside is padded with 0, so move the background's -1 to 0 and back.
    return F.grid_sample(pixels + 1, grid, align_corners=False) - 1
