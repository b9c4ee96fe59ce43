"""The model, under the documented path."""

from blip3o_dit.config import BLIP3oDiTConfig
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel

__all__ = ["BLIP3oDiTConfig", "BLIP3oDiTModel"]
