"""A Space: pick or upload an image, and watch the routed classifier certify it.

    pip install "rsrouter[space]" && python examples/space/app.py

Works offline on the bundled Fashion-MNIST experts; `RSROUTER_MODEL=org/name` serves a published router instead,
and `RSROUTER_DATA=hf-hub:org/data@revision` (or a file) puts images of its own into the gallery.
`python examples/space/make.py OUT` writes a folder that can be put on the Hub as a Space.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import live
import torch
from PIL import Image

from rsrouter import RoutedSmooth, load_data
from rsrouter.demo import CLASSES, load_slice

MODEL, DATA = os.environ.get("RSROUTER_MODEL"), os.environ.get("RSROUTER_DATA")
GALLERY = 24
INTRODUCTION = """# Watch a certificate being made
Randomized smoothing asks a classifier about thousands of noisy copies of one image. If one class wins clearly enough, *no* change
of the image within an L2 radius can turn the smoothed answer. Each noise level has an expert of its own: large noise holds at
large radii, small noise sees details. The stages below decide which one answers."""
SMALL_PRINT = """What is certified: with probability at least 99.9% over this noise, the smoothed routed classifier answers this
class everywhere within the radius (pixels in [0,1], L2). Not certified: that the class is right, other norms, rotations or crops.
[Cohen et al. 2019](https://arxiv.org/abs/1902.02918), [Dual RS](https://arxiv.org/abs/2512.01782)."""
BUDGETS = {"2,000": 2_000, "10,000": 10_000, "50,000": 50_000}


@cache
def router() -> RoutedSmooth:
    """The published router that was asked for, or the demo's trained one."""
    return RoutedSmooth.from_pretrained(MODEL) if MODEL else live.demo_router(Path(__file__).resolve().parent)


@cache
def data() -> Any:
    """Images for the gallery: those that were named, else the bundled ones where the router takes such; None without any."""
    if DATA:
        return load_data(DATA)
    bundled = load_slice("test")
    return bundled if tuple(bundled.image(0).shape) == tuple(router().pool.input_shape) else None


@cache
def classes() -> tuple[str, ...]:
    known = CLASSES if not MODEL else () if data() is None else data().classes or ()
    return live.class_names(router(), known)


@cache
def examples() -> list[tuple[Image.Image, str]]:
    """The first images of the gallery, with their labels."""
    images = data()
    rows = [] if images is None else [(images.image(i), images[i][1]) for i in range(min(GALLERY, len(images)))]
    return [(live.to_picture(image, 84), classes()[label] if label >= 0 else "") for image, label in rows]


def pick(event: gr.SelectData) -> Image.Image:
    """The image that was clicked, pixel for pixel."""
    image = data().image(event.index)
    return live.to_picture(image, image.shape[-1])


def show_noise(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    image = live.as_pixels(picture, router().pool.input_shape)
    return live.certified_pixels(image) + live.noisy_copies(router(), image)


def certify(picture: Image.Image | None, budget: str) -> Iterator[tuple[Any, ...]]:
    """Verdict, stages, curve, the experts by themselves, and what the slider needs, again after every round of votes."""
    if picture is None:
        raise gr.Error("Pick one of the images, or upload one, then press Certify.")
    image, n_max = live.as_pixels(picture, router().pool.input_shape), BUDGETS[budget]
    for moment in live.watch(router(), image, n_max):
        drawn = live.verdict(moment, classes()), live.stages(moment, router(), classes()), live.curve(moment, n_max)
        yield *drawn, "", None, "", gr.update(value=0, interactive=False)
    held = moment.predict >= 0 and moment.radius > 0
    known = (image, live.worst_direction(router(), image, moment.predict), moment) if held else None
    for beside in live.experts_beside(router(), image, n_max, moment, classes()):
        yield *drawn, beside, known, "", gr.update(interactive=held)


def move(known: Any, radii: float) -> str:
    """The image moved by so many of its radii."""
    return "" if known is None else live.moved(router(), known[0], known[1], known[2], radii, classes())


def build() -> gr.Blocks:
    """The page."""
    nothing = live.Moment()
    with gr.Blocks(title="rsrouter: watch a certificate", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                gr.Markdown("**Pick** a test image", visible=bool(examples()))
                gallery = gr.Gallery(
                    examples(),
                    show_label=False,
                    visible=bool(examples()),
                    columns=4,
                    height=290,
                    allow_preview=False,
                    elem_id="bundled",
                    interactive=False,
                    object_fit="contain",
                    buttons=[],
                )
                gr.Markdown("or **upload** your own (cropped to the middle)")
                picture = gr.Image(
                    show_label=False,
                    type="pil",
                    image_mode="RGB",
                    height=220,
                    elem_id="picture",
                    sources=["upload", "clipboard"],
                    buttons=[],
                )
                budget = gr.Radio(list(BUDGETS), value="10,000", label="At most this many votes per stage", elem_id="budget")
                button = gr.Button("Certify", variant="primary", elem_id="certify")
            with gr.Column(scale=6, min_width=340):
                verdict = gr.HTML(live.verdict(nothing, classes()), elem_id="verdict")
                chart = gr.HTML(live.curve(nothing, BUDGETS["10,000"]), elem_id="curve")
                stages = gr.HTML(live.stages(nothing, router(), classes()), elem_id="stages")
                beside = gr.HTML(elem_id="beside")
                slider = gr.Slider(
                    0,
                    2,
                    value=0,
                    step=0.05,
                    label="Move the image against its class, by this many certified radii",
                    elem_id="slider",
                    interactive=False,
                )
                there = gr.HTML(elem_id="moved")
                noisy = gr.HTML(elem_id="noisy")
                known = gr.State()
        gr.Markdown(SMALL_PRINT)
        gallery.select(pick, None, picture)
        picture.change(show_noise, picture, noisy)
        button.click(certify, [picture, budget], [verdict, stages, chart, beside, known, there, slider], show_progress="hidden")
        slider.release(move, [known, slider], there, show_progress="hidden")
    return page


def launch(**options: object) -> gr.Blocks:
    """Builds and serves the page; `options` go to gradio."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    page = build()
    # the system's own fonts: nothing is fetched from elsewhere
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Base(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"])
    page.queue(default_concurrency_limit=1).launch(theme=theme, css_paths=Path(__file__).with_name("style.css"), **options)  # type: ignore[arg-type]
    return page


if __name__ == "__main__":
    launch()
