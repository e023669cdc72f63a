# %% [markdown]
# # Serve answers
#
# `certify` says, offline, how far an answer holds. `predict` answers requests: the class that the ideal smoothed classifier gives
# to exactly these pixels, or -1 where the votes do not decide, wrong with probability at most alpha for each request.

# %%
from rsrouter import CascadeRouter, ExpertPool, RoutedSmooth
from rsrouter.demo import CLASSES, load_pool, load_slice

pool = ExpertPool([load_pool()["sigma_0.5"], load_pool()["sigma_1"]])
routed = RoutedSmooth(pool, CascadeRouter((0.6,)))
images, labels = load_slice("test").batch(range(6))

for n in (20, 100, 1000):
    answers = routed.predict(images, n=n, alpha=0.001)
    print(f"{n:>5} votes:", *("?" if a < 0 else CLASSES[a] for a in answers))

# %% [markdown]
# Fewer votes mean more abstentions, never less confidence. The noise is fresh for every request: leave `seed` out, because an
# attacker who knows it could look for an image that fools just those votes.
#
# ## Over HTTP
#
# `examples/serve_fastapi.py` turns a budget of milliseconds into a number of votes, and reports every refusal in one form. Here
# it is called within this process; `python examples/serve_fastapi.py org/router --port 8000` serves it.

# %%
import io
import os
import sys

from fastapi.testclient import TestClient
from PIL import Image

sys.path.insert(0, os.path.join(os.environ["RSROUTER_ROOT"], "examples"))  # a checkout
from serve_fastapi import create_app

png = io.BytesIO()
Image.fromarray((images[0, 0] * 255).round().byte().numpy()).save(png, "PNG")
with TestClient(create_app(routed, classes=CLASSES)) as client:
    good = client.post("/predict", files={"image": png.getvalue()}, data={"budget_ms": "2000"})
    bad = client.post("/predict", files={"image": b"not a picture"})
answer = good.json()
print(good.status_code, {key: answer[key] for key in ("class", "name", "alpha") if key in answer})
print(bad.status_code, bad.json()["error"])

# %% [markdown]
# How many votes a budget needs, and how to bound repeated requests, is in [Deploy](../guide/deploy.md).
