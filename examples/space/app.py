"""A Space: pick or upload an image, and watch the routed classifier certify it.

    pip install "rsrouter[space]" && python examples/space/app.py

Works offline on the bundled Fashion-MNIST experts; `RSROUTER_MODEL=org/name` serves a published router instead.
`python examples/space/make.py OUT` writes a folder that can be put on the Hub as a Space.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import live
import torch
from PIL import Image

from rsrouter import RoutedSmooth
from rsrouter.demo import CLASSES, load_slice

MODEL = os.environ.get("RSROUTER_MODEL")
BUNDLED = 24
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
def classes() -> tuple[str, ...]:
    return live.class_names(router(), () if MODEL else CLASSES)


@cache
def examples() -> list[tuple[Image.Image, str]]:
    """The first bundled test images, with their labels."""
    data = load_slice("test")
    return [(live.to_picture(data.image(i), 84), CLASSES[data[i][1]]) for i in range(BUNDLED)]


def pick(event: gr.SelectData) -> Image.Image:
    """The bundled image that was clicked, pixel for pixel."""
    return live.to_picture(load_slice("test").image(event.index), 28)


def show_noise(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    image = live.as_pixels(picture, router().pool.input_shape)
    return live.certified_pixels(image) + live.noisy_copies(router(), image)


def certify(picture: Image.Image | None, budget: str) -> Iterator[tuple[str, str, str, str]]:
    """Verdict, stages, curve and the experts by themselves, again after every round of votes."""
    if picture is None:
        raise gr.Error("Pick one of the images, or upload one, then press Certify.")
    image, n_max = live.as_pixels(picture, router().pool.input_shape), BUDGETS[budget]
    for moment in live.watch(router(), image, n_max):
        drawn = live.verdict(moment, classes()), live.stages(moment, router(), classes()), live.curve(moment, n_max)
        yield *drawn, ""
    for beside in live.experts_beside(router(), image, n_max, moment, classes()):
        yield *drawn, beside


def build() -> gr.Blocks:
    """The page."""
    nothing = live.Moment()
    with gr.Blocks(title="rsrouter: watch a certificate", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                gr.Markdown("**Pick** a bundled test image")
                gallery = gr.Gallery(
                    examples(),
                    show_label=False,
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
                noisy = gr.HTML(elem_id="noisy")
        gr.Markdown(SMALL_PRINT)
        gallery.select(pick, None, picture)
        picture.change(show_noise, picture, noisy)
        button.click(certify, [picture, budget], [verdict, stages, chart, beside], show_progress="hidden")
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
