"""DemoConfig: the flags of `demo`."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_dit.utils.settings import check_settings, setting


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What a model is shown with."""

    embeddings_path: str | None = setting(
        None,
        "embedding store or documented pickle: samples to pick, and nearest ones (default: none)",
        group="what is shown",
    )
    split: str = setting(
        "all",
        "samples to pick: a side of the training run's own split, or all",
        choices=("all", "train", "eval"),
    )
    pictures: str | None = setting(
        None, "where the store's pictures are, as for extract (default: where they were)"
    )
    decoder: str | None = setting(
        None, "show tokens as pictures, by this decoder, see train-decoder (default: do not)"
    )
    eva: str | None = setting(
        None,
        "tower of the conditions (default: the one the model's data was made with, if it is on this disk)",
        group="towers that read pictures",
    )
    clip: str | None = setting(None, "tower of the true tokens (default: likewise)")

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("pictures", "split"):
            if self.embeddings_path is None and getattr(self, name) != getattr(DemoConfig, name):
                raise ValueError(f"--{name}: expected --embeddings_path beside it, found none")
