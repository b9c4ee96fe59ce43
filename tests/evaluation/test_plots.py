"""Plots with any name: of files, folders and models."""

from __future__ import annotations

import base64
import os
import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from blip3o_dit.evaluation.plots import curve_plot, sample_plot

NAMES = ["$x_1^{2", "$\\frac{$", os.fsdecode(b"caf\xe9"), "a\x1b[2J\x00", "\u202eתصویر", "漢\U0001f600"]


def texts(element: str) -> str:
    """What is written in a plot; raises unless it is well-formed."""
    match = re.search('base64,([^"]*)', element)
    assert match is not None
    return " ".join(ElementTree.fromstring(base64.b64decode(match[1])).itertext())


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_drawn_as_it_is(name: str) -> None:
    point = {"network_calls": 1, "solver": "euler", "energy_score": {"value": 0.5}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = {name: np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)}
        tokens["true"] = tokens[name]
        drawn = texts(sample_plot(tokens, [Image.new("RGB", (9, 9)), None], [name, "other"]))
        if "$" in name:
            assert name in drawn
        curve_plot({name: [point, point], "b": [point]}, None)
