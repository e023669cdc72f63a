# %% [markdown]
# # Your first router
#
# Three classifiers ship with the package. Each was trained on Fashion-MNIST at its own noise level: sigma 0.25, 0.5
# and 1. Here they get a router, and the routed classifier is certified. Everything is small, so that it takes a minute on two
# cores; the figures are those of a first try.

# %%
from rsrouter.demo import CLASSES, load_pool, load_slice

pool = load_pool()
pool

# %% [markdown]
# ## Train
#
# A router needs labelled images that no expert was trained on: some to train on, others to choose on. `deferral` routers are
# small heads on the frozen experts, asked one after the other; `quick` trains few of them.

# %%
from dataclasses import replace

import torch
from rsrouter import train_router
from rsrouter.training import DEFERRAL_RECIPES

quick = DEFERRAL_RECIPES["quick"]
recipe = replace(quick, heads=tuple(replace(head, steps=50) for head in quick.heads))


def part(name, count):
    images, labels = load_slice(name).batch(range(count))
    return images, torch.as_tensor(labels)


radii = [0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
images, labels = part("train", 200)
routed = train_router(
    pool,
    "deferral",
    images,
    labels,
    radii=radii,
    recipe=recipe,
    validation=part("validation", 60),
    plan_n=2_000,
    out="router",
    seed=0,
    show=False,
)
for name, stage in routed.tree.stages.items():
    print(name, "is smoothed at", stage.sigma)

# %% [markdown]
# ## Certify
#
# A certificate has a class and a radius: nobody can change the answer of the smoothed classifier by moving the image by less
# than that radius (L2 distance, pixels in [0, 1]). An adaptive plan draws votes until each image's place among your radii is
# settled.

# %%
from rsrouter import AdaptivePlan

test, truth = part("test", 5)
for certificate, label in zip(routed.certify(test, AdaptivePlan(2_000, radii)), truth):
    answer = "no class" if certificate.predict < 0 else CLASSES[certificate.predict]
    print(f"{answer:>8} within {certificate.radius:.3f}, is {CLASSES[label]}")

# %% [markdown]
# ## Compare with the experts
#
# On the command line one verb certifies the router and every expert, each at the radii it can reach, into one folder: a *run*.
# `--data demo` stands for the bundled test images; your own data go in its place.

# %%
# !rsrouter certify router --data demo --count 12 --n 2000 --radii 0:1.5:0.25 --experts --out run
# !rsrouter report run --data demo --title "A first router, 12 images" --out report

# %%
from IPython.display import SVG

SVG("report/curve.svg")

# %% [markdown]
# The grey curve is the *envelope*: the best expert at each radius, which no single model reaches. `report/index.html` has the
# whole page. Next: [your own checkpoints](own_checkpoints.md).
