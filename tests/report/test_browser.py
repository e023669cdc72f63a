"""The page in a real browser: wide and narrow, light and dark, without a console message, nothing cut off."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_page import HOSTILE, N, tables

from rsrouter.report import write_report

pytestmark = pytest.mark.slow

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)

# runs after the page's own script: moves the pointer, then writes what it measured into the title
PROBE = """
<script>
addEventListener("load", () => {
  const plot = document.querySelector("#main-figure .plot"), box = plot.getBoundingClientRect();
  const at = { clientX: box.left + box.width * 0.4, clientY: box.top + 20, bubbles: true };
  plot.dispatchEvent(new PointerEvent("pointermove", at));
  const shown = [...document.querySelectorAll("svg.chart")].filter((svg) => svg.getBoundingClientRect().width > 0);
  const small = shown.flatMap((svg) => [...svg.querySelectorAll("text")]).map((text) => {
    const svg = text.ownerSVGElement;
    return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  });
  document.title = "PROBE" + JSON.stringify({
    overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth, charts: shown.length,
    all: document.querySelectorAll("svg.chart").length, readout: document.querySelector(".readout").textContent,
    hidden: document.querySelector(".readout").hidden, smallest: Math.min(...small),
    paper: getComputedStyle(document.documentElement).backgroundColor,
  });
});
</script>
"""


def browse(page: Path, folder: Path, width: int, dark: bool, *more: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    names = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update")
    flags = [f"--{name}" for name in (*names, "disable-sync", "hide-scrollbars", "enable-logging=stderr")]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1400"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    return subprocess.run([BROWSER, *flags, *more, page.as_uri()], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 500], ids=["wide", "narrow"])
def test_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    images = np.random.default_rng(0).uniform(size=(N, 3, 32, 32))
    path = write_report(tables((HOSTILE, "a rather long name of an expert", "sigma-1.00")), tmp_path / "report", images=images)
    assert path.stat().st_size < 3_000_000
    probed = path.with_name("probed.html")
    probed.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    done = browse(probed, tmp_path, width, dark, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>PROBE(.*?)</title>", done.stdout)
    assert found is not None, done.stderr
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["all"] == 2 * seen["charts"] == 8
    assert seen["smallest"] >= 9
    assert not seen["hidden"]
    assert re.match(r"r = \d\.\d\d", seen["readout"])
    assert HOSTILE in seen["readout"]
    assert seen["paper"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    folder = Path(os.environ.get("RSROUTER_SCREENSHOTS", tmp_path))
    shot = folder / f"report-{width}-{'dark' if dark else 'light'}.png"
    browse(path, tmp_path, width, dark, f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == width
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
