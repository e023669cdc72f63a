# %% [markdown]
# # ImageNet: from a folder to a table, with the costs
#
# How to proceed with a data set that does not fit into memory and takes days: look at the folder, estimate, cut the work into
# shards, merge, report. To run anywhere in a minute, the folder here holds 12 synthetic pictures in 3 classes, and the networks
# are tiny and random; the commands are the ones for the real thing.

# %%
from pathlib import Path

import numpy as np
import torch
from PIL import Image

rng = np.random.default_rng(0)
for k, name in enumerate(("n01440764", "n02102040", "n03028079")):  # folders as in ImageNet
    Path(f"val/{name}").mkdir(parents=True)
    for i in range(4):
        picture = rng.integers(0, 90, (60 + 10 * i, 80, 3)).astype(np.uint8)
        picture[..., k] += 120
        Image.fromarray(picture).save(f"val/{name}/{i}.JPEG")

# %% [markdown]
# ## Look first
#
# Classes are folders in alphabetical order. `inspect` says what is there, what would be passed over, and which sizes there are.

# %%
# !rsrouter inspect val --no-fingerprint

# %% [markdown]
# A folder with only some of ImageNet's classes counts them from 0, and a network of 1000 classes means other classes by these
# numbers: `--classes FILE`, with all 1000 folder names in the network's order, one per line, puts that right. `certify` warns
# where they do not match.
#
# Pictures of several sizes need `--size`: for 224 the short side becomes 256 and the centre is cropped, as is usual for
# ImageNet. Here 32 is enough.
#
# ## Two experts
#
# For models that timm knows by name, `--architecture` is enough (`resnet50` for Cohen's ImageNet files). These two are random,
# so their certificates show only that the commands work.

# %%
import timm

for sigma in (0.25, 0.5):
    torch.manual_seed(1)
    module = timm.create_model("test_resnet", num_classes=3)
    torch.save({"state_dict": module.state_dict(), "arch": "test_resnet"}, f"sigma_{sigma}.pth.tar")

# %%
# !rsrouter wrap sigma_0.25.pth.tar sigma_0.5.pth.tar --sigma 0.25,0.5 --normalisation imagenet --input-shape 3,32,32 \
#     --num-classes 3 --out pool.json
# !rsrouter train pool.json --data val --size 32 --kind cascade --radii 0,0.5 --n 1000 --out router

# %% [markdown]
# ## What it will cost
#
# `--estimate` draws a few votes on images of the job, times them, and writes nothing. Run it on a machine of the kind that will
# do the work; for ImageNet say `--device cuda --workers auto` and `--n 100000`.

# %%
# !rsrouter certify router --data val --size 32 --radii 0,0.5 --n 1000 --estimate

# %% [markdown]
# ## Shards
#
# Each of N machines takes one part; each part resumes when its command is given again. Merged, they are the table that one
# machine would have written. On a CPU give every part the same `--threads`.

# %%
# !rsrouter certify router --data val --size 32 --radii 0,0.5 --n 1000 --threads 1 --shard 0/2 --out run/shard-0.tsv > /dev/null
# !rsrouter certify router --data val --size 32 --radii 0,0.5 --n 1000 --threads 1 --shard 1/2 --out run/shard-1.tsv > /dev/null
# !rsrouter merge run/shard-0.tsv run/shard-1.tsv --out run/certificates.tsv

# %%
# !head -n 3 run/certificates.tsv | cut -f 1-9
# !rsrouter report run/certificates.tsv --data val --size 32 --out run/report

# %% [markdown]
# Slurm arrays, Ray and several GPUs are in [Clusters](../clusters.md).
