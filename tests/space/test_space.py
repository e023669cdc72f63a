"""The Space: its live certificate is the library's, and the page works in a real browser."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsrouter import ABSTAIN, ExpertPool
from rsrouter.demo import load_router
from tests.helpers import small_router as small

SPACE = Path(__file__).resolve().parents[2] / "examples" / "space"


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SPACE))
    yield importlib.import_module("live")
    sys.modules.pop("live", None)


@pytest.fixture
def routed():
    return small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))


def test_moments_grow_into_a_certificate(live, routed) -> None:
    image = small.images().image(0)
    moments = [(m.votes, m.radius, m.predict, m.done) for m in live.watch(routed, image, 1000)]
    assert len(moments) > 4
    assert [v for v, *_ in moments] == sorted(v for v, *_ in moments)
    assert [done for *_, done in moments] == [False] * (len(moments) - 1) + [True]
    assert moments[-1][2] == 0
    assert 0.2 < moments[-1][1] < 0.6
    last = list(live.watch(routed, image, 1000))[-1]
    assert last.path[-1] in {"sigma_0.25", "sigma_0.5"}
    assert last.votes == last.curve[-1][0]
    for votes in last.counts.values():
        assert 100 <= sum(votes) <= 1000


def test_a_hopeless_image_abstains(live, routed) -> None:
    grey = torch.full(small.SHAPE, 0.5)
    last = list(live.watch(routed, grey, 500))[-1]
    assert last.predict == ABSTAIN
    assert last.radius == 0.0
    assert 'data-state="abstains"' in live.verdict(last, ("a", "b", "c"))


def test_what_is_drawn(live, routed) -> None:
    image = small.images().image(1)
    last = list(live.watch(routed, image, 500))[-1]
    classes = ("<b>bright</b>", "middle", "right")
    page = live.verdict(last, classes) + live.stages(last, routed, classes) + live.curve(last, 500)
    assert "<b>bright" not in page
    assert page.count('class="decided"') == 1
    assert f"{np.floor(last.radius * 1000) / 1000:.3f}" in page
    assert live.noisy_copies(routed, image).count("<img") == 8


def test_the_experts_stand_beside_with_names(live, routed) -> None:
    image = small.images().image(1)
    moment = list(live.watch(routed, image, 500))[-1]
    *_, page = live.experts_beside(routed, image, 500, moment, ("left", "<b>middle</b>", "right"))
    assert page.count("<tr><th>") == 4  # a head, the router, two experts
    assert page.count("&lt;b&gt;middle") == 3
    assert "sigma_0.25" in page
    assert live.certified_pixels(image).count("<img") == 1
    assert "4 x 4 pixels" in live.certified_pixels(image)


def test_a_moved_image_is_told_from_inside_and_outside(live, routed) -> None:
    image = small.images().image(1)
    moment = list(live.watch(routed, image, 500))[-1]
    direction = live.worst_direction(routed, image, moment.predict)
    assert abs(float(direction.norm()) - 1) < 1e-5
    classes = ("left", "<b>middle</b>", "right")
    near, far = (live.moved(routed, image, direction, moment, r, classes, n=200) for r in (0.5, 8.0))
    assert 'data-state="inside"' in near
    assert 'data-state="outside"' in far
    assert "<b>middle" not in near.replace("<b>&lt;b&gt;middle", "")
    assert "nothing is promised" in far


def test_stages_have_names_for_people(live, routed) -> None:
    assert live.stage_names(routed) == {
        n: f"router at noise {s.sigma:g}" if n == "router" else n for n, s in routed.tree.stages.items()
    }
    demo = live.demo_router(SPACE)
    assert all("@" not in title for title in live.stage_names(demo).values())
    assert "a network of its own at noise 0.65" in live.stage_names(demo).values()


def test_classes_are_called_by_their_names(live, routed) -> None:
    assert live.class_names(routed) == ("class 0", "class 1", "class 2")
    assert live.class_names(routed, ("a", "b")) == ("class 0", "class 1", "class 2")
    assert live.class_names(routed, ("a", "b", "c")) == ("a", "b", "c")
    named = [e.with_settings(labels=("left", "middle", "right")) for e in routed.pool]
    assert live.class_names(small.routed(ExpertPool(named)), ("a", "b", "c")) == ("left", "middle", "right")


def test_a_folder_for_the_hub(live, routed, tmp_path: Path) -> None:
    """What `make.py` writes holds the package and requirements that this environment meets."""
    from packaging.requirements import Requirement

    make = importlib.import_module("make")
    make.write(tmp_path / "space", router=routed.save_pretrained(tmp_path / "router"))
    lines = (tmp_path / "space" / "requirements.txt").read_text().split("\n")
    wanted = [Requirement(line) for line in lines if line]
    assert {"torch", "timm", "gradio"} <= {r.name for r in wanted}
    assert "rsrouter" not in {r.name for r in wanted}
    for requirement in wanted:
        if requirement.name != "gradio":
            assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    assert (tmp_path / "space" / "rsrouter" / "smooth.py").is_file()
    assert not list((tmp_path / "space").rglob("__pycache__"))
    assert live.demo_router(tmp_path / "space").digest == routed.digest
    assert live.demo_router(tmp_path / "nothing" / "here").digest == load_router().digest


def test_pictures_of_any_kind(live) -> None:
    for mode, size in (("RGB", (40, 90)), ("L", (28, 28)), ("RGBA", (7, 5)), ("P", (100, 100))):
        pixels = live.as_pixels(Image.new(mode, size), (1, 28, 28))
        assert pixels.shape == (1, 28, 28)
        assert live.as_pixels(Image.new(mode, size), (3, 32, 32)).shape == (3, 32, 32)
    exact = small.images().image(2)
    assert torch.equal(live.as_pixels(live.to_picture(exact, 4), small.SHAPE), exact)


@pytest.mark.slow
def test_in_a_browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pick a bundled image, see its noise, certify, upload a picture, certify again; nothing is fetched from elsewhere."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    monkeypatch.syspath_prepend(str(SPACE))
    app = importlib.import_module("app")
    page_server = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    Image.effect_noise((64, 48), 60).save(tmp_path / "upload.png")
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1100})
            errors, outside = [], []
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda r: outside.append(r.url) if r.url.startswith("http") and "127.0.0.1" not in r.url else None)
            page.goto(page_server.local_url)
            page.locator("#bundled .thumbnail-item").first.wait_for(timeout=60_000)
            page.locator("#bundled .thumbnail-item").nth(1).click()
            page.locator(".noisy img").first.wait_for(timeout=30_000)
            assert page.locator(".noisy img").count() % 4 == 0
            assert page.locator(".certified img").count() == 1
            page.locator("#certify").click()
            page.locator(".verdict.live").wait_for(timeout=30_000)  # votes on their way
            page.locator(".verdict.done").wait_for(timeout=120_000)
            assert page.inner_text("#class") == "Pullover"
            assert float(page.inner_text("#radius")) > 0.25
            assert page.locator(".stages li.decided").count() == 1
            page.locator(".beside tr").nth(3).wait_for(timeout=120_000)  # routed and three experts
            page.locator("#slider input[type=range]:not([disabled])").wait_for(timeout=60_000)
            for place, state in ((0.3, "inside"), (0.95, "outside")):
                box = page.locator("#slider input[type=range]").bounding_box()
                page.mouse.click(box["x"] + place * box["width"], box["y"] + box["height"] / 2)
                page.locator(f".moved[data-state={state}]").wait_for(timeout=60_000)
            page.locator("#budget input").first.check()
            page.locator("#picture button[aria-label^='Remove'], #picture button[aria-label^='Clear']").first.click()
            page.locator("#picture input[type=file]").set_input_files(str(tmp_path / "upload.png"))
            page.locator("#picture img").wait_for(timeout=30_000)
            time.sleep(1)
            page.locator("#certify").click()
            page.locator(".verdict.live").wait_for(timeout=30_000)
            page.locator(".verdict.done").wait_for(timeout=120_000)
            shots = Path(os.environ.get("RSROUTER_SCREENSHOTS", tmp_path))
            page.screenshot(path=shots / "space-1280.png", full_page=True)
            assert not errors
            assert not outside
            page.set_viewport_size({"width": 390, "height": 844})
            page.screenshot(path=shots / "space-390.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            browser.close()
    finally:
        page_server.close()
        sys.modules.pop("app", None)
        sys.modules.pop("live", None)
