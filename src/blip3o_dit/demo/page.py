"""The page: gradio's components around `Demo`, served on this machine only, one answer at a time.

Names, keys and errors are plain text, never HTML, and the page loads nothing from elsewhere. An uploaded
picture is kept in a temporary folder that is removed when the server ends.
"""

from __future__ import annotations

import html
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.middleware.trustedhost import TrustedHostMiddleware

from blip3o_dit.demo.answers import Answer, Demo, Row
from blip3o_dit.evaluation.sample_maps import data_address
from blip3o_dit.utils.json_files import escaped, one_line

ADDRESS = "127.0.0.1"
OFFERED = 8  # of the store's samples, shown to pick from
DRAWS, MOST_DRAWS = 4, 16
MAX_UPLOAD = "64mb"
CSS = """
.gradio-container { max-width: 1180px !important; }
.said h1, .said h2, .said h3 { margin: 1rem 0 .3rem; overflow-wrap: anywhere; }
.said p { margin: 0 0 .4rem; overflow-wrap: anywhere; max-width: 46rem; }
.said .wrong { color: #c62828; font-weight: 600; }
.said .row { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.8rem, 1fr)); gap: .7rem; }
.said figure { margin: 0; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
.said img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; }
.samples .grid-wrap { min-height: 0 !important; padding-top: 1.8rem; overflow: auto; }
.samples .grid-container { grid-template-columns: repeat(4, 1fr) !important; grid-auto-rows: auto; }
"""


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket of this machine. Raises ValueError when the port is taken, or is none."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((ADDRESS, port))
            found.listen()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--port: expected a free one (0 takes any), found {port}: {one_line(error)}"
            ) from error
        yield found


@contextmanager
def server_of(demo: Demo) -> Iterator[uvicorn.Server]:
    """What serves the page, on a socket of `listening`, until its `should_exit` or control-C."""
    with TemporaryDirectory(prefix="blip3o-dit-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when components and the application are made
        page = build_page(demo).queue(default_concurrency_limit=1, api_open=False)
        app = FastAPI(openapi_url=None)
        # Pages of other sites whose name leads here get no answer (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[ADDRESS, "localhost"])
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        app = gr.mount_gradio_app(
            app,
            page,
            path="/",
            theme=theme,
            css=CSS,
            footer_links=[],
            run_history=False,
            max_file_size=MAX_UPLOAD,
            ssr_mode=False,
            mcp_server=False,
        )
        # Not a traceback for each page that is open when it ends
        quiet: dict[str, Any] = {"log_config": None, "log_level": "critical"}
        yield uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **quiet))


def build_page(demo: Demo) -> gr.Blocks:
    """What can be asked on the left (on a phone above), the answer on the right."""
    gallery = demo.gallery
    last = 1 if gallery is None else max(1, len(gallery.offered) - 1)
    shown = [] if gallery is None else gallery.offered[:: 1 + last // OFFERED]
    with gr.Blocks(title="blip3o-dit demo", analytics_enabled=False) as page:
        gr.HTML(_about(demo), elem_classes="said")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                takes = demo.condition_tower is not None
                picture = gr.File(label="A picture of yours", type="binary", height=140, visible=takes)
                samples = gr.Gallery(
                    [] if gallery is None else gallery.thumbnails(shown),
                    label="A sample of the store",
                    elem_classes="samples",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    visible=gallery is not None,
                )
                number = gr.Slider(
                    0, last, 0, step=1, label="Number of the sample", visible=gallery is not None
                )
                seed = gr.Number(0, label="Seed of the noise", precision=0)
                draws = gr.Slider(2, MOST_DRAWS, DRAWS, step=1, label="Draws")
                again = gr.Button("Generate", variant="primary")
            with gr.Column(scale=3, min_width=300):
                answer = gr.HTML("Drop a picture, or pick a sample.", elem_classes="said")

        def picked(event: gr.SelectData) -> tuple[None, int]:
            return None, event.index * (1 + last // OFFERED)

        inputs = [picture, number, seed, draws]
        ask: dict[str, Any] = {"fn": partial(_answered, demo), "inputs": inputs, "outputs": answer}
        again.click(**ask)
        picture.upload(**ask)
        number.release(lambda: None, outputs=picture).then(**ask)
        samples.select(picked, outputs=[picture, number]).then(**ask)
    return page


def _about(demo: Demo) -> str:
    tokens, eva, clip = demo.inference.model.config.data_sizes
    name = Path(demo.inference.name)  # the folder as it was given, or owner/name of the hub
    name = demo.inference.model_path if name.is_absolute() else name
    lines = [
        f"{name} generates {tokens} tokens of {clip} numbers from {tokens} tokens of {eva}.",
        *([] if demo.gallery is None else [f"The store is {demo.gallery.source.path}."]),
        *demo.notes,
    ]
    return "<h1>What does this model make of a picture?</h1>" + _paragraphs(lines)


def _answered(demo: Demo, data: bytes | None, number: int, seed: int, draws: int) -> str:
    """The answer as HTML, or one line that says why there is none."""
    try:
        asked = demo.sample(number) if data is None else demo.picture(data)
        return _as_html(demo.answer(asked, seed=seed, draws=draws))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return f'<p class="wrong" role="alert">{_text(one_line(error))}</p>'


def _as_html(answer: Answer) -> str:
    rows = [f"<h3>{_text(name)}</h3>{_row(row)}" for name, row in answer.rows.items()]
    return f"<h2>{_text(answer.title)}</h2>{_paragraphs([answer.figures])}{''.join(rows)}"


def _row(row: Row) -> str:
    images = [f'<img src="{data_address(image, "PNG")}" alt="">{_text(caption)}' for image, caption in row]
    return f'<div class="row">{"".join(f"<figure>{image}</figure>" for image in images)}</div>'


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{_text(line)}</p>" for line in lines)


def _text(text: str) -> str:
    return html.escape(escaped(text))
