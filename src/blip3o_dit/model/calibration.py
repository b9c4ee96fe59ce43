"""What calibration found of a model, written beside its weights; how: `training/calibration.py`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from blip3o_dit.utils.json_files import read_json_object, short_repr
from blip3o_dit.utils.validation import check_integer, check_known, check_range, error_context, is_number

CALIBRATION_FILE = "calibration.json"
FIGURES = ("energy_score", "spread_error_ratio")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The scale of the noise that sampling starts from, and what of it was measured on samples held back.

    Args:
        samples: how many. before, after: `FIGURES` of them without the scale and with it.
        steps: optimizer steps of the training; 0 where nothing is known of it.
        energy_scores: [step, energy score] of some of these samples while it trained.
        weights_of: the step whose averaged weights the model has.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    noise_scale: float
    samples: int
    before: dict[str, float]
    after: dict[str, float]
    steps: int = 0
    energy_scores: list[list[float]]
    weights_of: int = 0

    def __post_init__(self) -> None:
        check_range("noise_scale", self.noise_scale, 0.0, 100.0)
        for name in ("samples", "steps", "weights_of"):
            check_integer(name, getattr(self, name), 0)
        for name, found in (("before", self.before), ("after", self.after)):
            if not isinstance(found, dict) or not all(is_number(found.get(figure)) for figure in FIGURES):
                raise ValueError(f"{name}: expected {' and '.join(FIGURES)}, found {short_repr(found)}")
        scores = self.energy_scores
        if not isinstance(scores, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in scores
        ):
            raise ValueError(f"energy_scores: expected pairs of step and score, found {short_repr(scores)}")

    def to_json(self) -> bytes:
        """The content of `calibration.json`."""
        return json.dumps(asdict(self), indent=2).encode()

    def sentences(self) -> list[str]:
        """For people: what the scale changed, and when training should have stopped."""
        before, after = self.before, self.after
        lines = [
            f"Sampling starts from {self.noise_scale:.3g} times the noise, fitted to {self.samples} samples "
            f"that were held back: spread over error {before['spread_error_ratio']:.2f} before, "
            f"{after['spread_error_ratio']:.2f} after; energy score {before['energy_score']:.4g} before, "
            f"{after['energy_score']:.4g} after."
        ]
        if len(self.energy_scores) < 2:
            return lines
        (best, lowest), (last, at_end) = (
            min(self.energy_scores, key=lambda pair: pair[1]),
            self.energy_scores[-1],
        )
        if best == last:
            lines.append("While it trained, their energy score fell to the end: more steps may help.")
        else:
            lines.append(
                f"Training should have stopped after step {best:.0f} of {self.steps}, when their energy "
                f"score was {lowest:.4g}; after step {last:.0f} it was {at_end:.4g} (--early_stop N stops by "
                f"it). The model has the averaged weights of step {self.weights_of}."
            )
        return lines


def read_calibration(folder: Path) -> Calibration | None:
    """What is known of a model's calibration; None for one without.

    Raises:
        ValueError: one line: the file is damaged.
    """
    file = folder / CALIBRATION_FILE
    if not file.is_file():
        return None
    values, names = read_json_object(file), [field.name for field in fields(Calibration)]
    check_known(file, values, names)
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{file}: expected {', '.join(missing)}, found none")
    with error_context(file):
        return Calibration(**values)
