"""blip3o-dit demo: a page on this machine to try a model on."""

from __future__ import annotations

import argparse
import logging
from importlib.util import find_spec

from blip3o_dit.cli.arguments import add_flags, add_weights, given_settings
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.demo.config import DemoConfig
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.validation import package_missing

EXAMPLES = (
    "blip3o-dit demo checkpoints/run --embeddings_path embeddings/store",
    "blip3o-dit demo checkpoints/run --embeddings_path embeddings/store --decoder checkpoints/decoder",
)

logger = logging.getLogger(__name__)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", help="folder of a model or checkpoint, or owner/name on the hub")
    add_flags(parser, DemoConfig)
    parser.group("the page").add_argument(
        "--port", type=int, default=7860, metavar="N", help="of this machine; 0 takes any (default: 7860)"
    )
    group = parser.group("weights and device")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )
    add_weights(group)


def run(arguments: argparse.Namespace) -> None:
    """Serve until control-C."""
    config = DemoConfig(**given_settings(arguments, DemoConfig))
    if find_spec("gradio") is None:
        raise package_missing("demo", "gradio")
    with working("loading torch, transformers and gradio"):
        from blip3o_dit.demo.opening import open_demo
        from blip3o_dit.demo.page import listening, server_of
        from blip3o_dit.inference.pipeline import BLIP3oInference
        from blip3o_dit.utils.distributed import check_alone

    check_alone("demo")
    with listening(arguments.port) as place:  # before a model is loaded
        inference = BLIP3oInference(arguments.model, device=arguments.device, weights=arguments.weights)
        with server_of(open_demo(inference, config)) as server:
            logger.info("http://%s:%d/ shows the model; control-C ends it", *place.getsockname())
            server.run(sockets=[place])
