"""The network, under the documented path."""

from blip3o_dit.model.transformer import NextDiT, NextDiTBlock

__all__ = ["NextDiT", "NextDiTBlock"]
