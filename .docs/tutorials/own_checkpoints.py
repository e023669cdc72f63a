# %% [markdown]
# # Your own checkpoints
#
# From `checkpoint.pth.tar` files, as Cohen et al. 2019 and the papers after them write them, to a router with certificates and
# a card, in five commands. To have files at hand, this page writes the bundled experts in that form; yours are there already.

# %%
from pathlib import Path

import numpy as np
import torch
from rsrouter.demo import load_pool, load_slice

for expert, folder in zip(load_pool(), ("noise_0.25", "noise_0.50", "noise_1.00")):
    Path(folder).mkdir()
    weights = {f"1.module.{name}": value for name, value in expert.module.state_dict().items()}
    torch.save({"epoch": 90, "arch": "small_cnn", "state_dict": weights}, f"{folder}/checkpoint.pth.tar")
for name, count in (("train", 300), ("validation", 80), ("test", 12)):
    images, labels = load_slice(name).batch(range(count))
    np.savez(f"{name}.npz", images=(images * 255).round().byte().numpy(), labels=np.asarray(labels))

# %% [markdown]
# ## Wrap
#
# A checkpoint records neither the noise it was trained with nor its normalisation, and a wrong value still gives certificates,
# only poor ones. So both are asked for. With `--data` the accuracy under noise is measured, and a normalisation that fits
# better is named.

# %%
# !rsrouter wrap noise_0.25/checkpoint.pth.tar noise_0.50/checkpoint.pth.tar noise_1.00/checkpoint.pth.tar \
#     --sigma 0.25,0.5,1 --normalisation fashion_mnist --input-shape 1,28,28 --num-classes 10 \
#     --licence apache-2.0 --data validation.npz --images 80 --out pool.json

# %% [markdown]
# ## Train
#
# `--kind cascade` trains nothing and only chooses order and thresholds; leave it out to train heads as well.

# %%
# !rsrouter train pool.json --data train.npz --validation validation.npz --kind cascade \
#     --radii 0:1.5:0.25 --n 2000 --out router

# %% [markdown]
# ## Certify, report
#
# `--experts` fills a run: the router's table and each expert's. After an interruption, run the same command again to go on.
# `--estimate` would say beforehand how long it takes.

# %%
# !rsrouter certify router --data test.npz --radii 0:1.5:0.25 --n 2000 --experts --out run

# %%
# !rsrouter report run --data test.npz --title "Three checkpoints, one classifier" --out run/report

# %%
from IPython.display import SVG

SVG("run/report/curve.svg")

# %% [markdown]
# ## Publish
#
# `rsrouter publish run org/name --with-experts org/expert` converts the checkpoints to safetensors, uploads and pins them, binds
# the router to those repositories and publishes it with its tables and card. It needs a login on the Hub, so here is what it
# *would* send:

# %%
# !rsrouter publish run org/router --with-experts org/expert --dry-run --format json > plan.json

# %%
import json

plan = json.loads(Path("plan.json").read_text())
print("repositories of experts:", *(expert["repo_id"] for expert in plan["experts"]))
print("files of the router:", *(file["path"] for file in plan["files"]), sep="\n  ")

# %% [markdown]
# The options of every step are in [From checkpoints to a report](../guide/researcher.md) and
# [Publish](../guide/publish.md).
