"""Plots with any name: of files, folders and models."""

from __future__ import annotations

import base64
import os
import re
import warnings
from xml.etree import ElementTree

import pytest

from blip3o_dit.evaluation.plots import curve_plot, position_plots, spread_plot

NAMES = [
    '<b>"a"',
    "$x_1^{2",
    "$\\frac{$",
    os.fsdecode(b"caf\xe9"),
    "a\x1b[2J\x00",
    "\u202eתصویر",
    "漢\U0001f600",
]


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
        sampler = {
            "name": name,
            "maps": {"cosine": [0.1, 0.2, 0.3, 0.4], "r2": [0.0, 0.0, 0.0, 0.0]},
            "spread_error": [{"spread": 1.0, "error": 1.0}],
        }
        drawn = [
            curve_plot({name: [point, point], "b": [point]}, (name, 0.4)),
            spread_plot([sampler]),
            *position_plots([sampler]),
        ]
    for plot in drawn:
        assert name not in plot or not set(name) & set('<>"')
        if "$" in name:
            assert name in texts(plot)
