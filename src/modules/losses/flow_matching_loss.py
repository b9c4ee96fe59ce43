"""The loss, under the documented path."""

from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss

__all__ = ["BLIP3oFlowMatchingLoss"]
