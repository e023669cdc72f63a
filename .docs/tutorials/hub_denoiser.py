# %% [markdown]
# # A denoiser and a classifier from the Hub
#
# A diffusion model and a classifier that never saw noise make an expert at every noise level (Carlini et al. 2023): the denoiser
# cleans the noisy image in one step, and the classifier looks at the result. So two repositories on the Hub give a pool, a
# router over it is the cascade of Jeong and Shin 2023, and nothing has to be trained.
#
# This page runs offline: a stand-in for the Hub serves two small networks from this machine, trained below on the bundled
# images. With repositories on the real Hub, leave out this first part.

# %%
import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ["RSROUTER_ROOT"])  # a checkout: the server is one of the tests' helpers
from tests.helpers.hub_server import HubServer

hub = HubServer(Path("hub")).__enter__()
os.environ.update(hub.env())  # before anything imports huggingface_hub

# %%
import json

import numpy as np
import torch
from rsrouter.demo import CLASSES, load_slice
from rsrouter.experts import Diffusion, build_architecture
from safetensors.torch import save
from torch.nn import functional as F

torch.manual_seed(0)
images, labels = load_slice("train").batch(range(3000))
labels = torch.as_tensor(labels)


def train(network, loss, steps):
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(network, torch.randint(len(images), (64,))).backward()
        optimiser.step()
        schedule.step()
    return save(network.eval().state_dict())


def names_the_class(network, rows):
    return F.cross_entropy(network((images[rows] - 0.286) / 0.353), labels[rows])


abar = Diffusion().alphas_cumprod().float()  # 1,000 steps, linear: Ho et al. 2020


def predicts_the_noise(network, rows):
    t = torch.randint(60, 420, (len(rows),))  # the steps that sigma 0.2 to 1.2 needs
    signal, noise = abar[t].view(-1, 1, 1, 1), torch.randn(len(rows), 1, 28, 28)
    noisy = signal.sqrt() * (2 * images[rows] - 1) + (1 - signal).sqrt() * noise
    return F.mse_loss(network(noisy, t), noise)


classifier = build_architecture("small_resnet", 10, {"width": 8, "blocks": [[8, 2], [16, 2]]}).train()
config = {"architecture": "small_resnet", "kwargs": {"width": 8, "blocks": [[8, 2], [16, 2]]}, "num_classes": 10}
config |= {"input_shape": [1, 28, 28], "mean": [0.286], "std": [0.353], "labels": CLASSES, "licence": "apache-2.0"}
files = {"model.safetensors": train(classifier, names_the_class, 200), "config.json": json.dumps(config)}
_ = hub.put("org/clean-classifier", files, tag="v1")

denoiser = build_architecture("small_unet", None, {"width": 8}).train()
_ = hub.put("org/denoiser", {"unet.safetensors": train(denoiser, predicts_the_noise, 250)}, tag="v1")

for name, count in (("train", 40), ("validation", 40), ("test", 8)):
    pixels, truth = load_slice(name).batch(range(count))
    np.savez(f"{name}.npz", images=(pixels * 255).round().byte().numpy(), labels=np.asarray(truth))

# %% [markdown]
# ## Wrap
#
# One line makes three experts out of two networks. A diffusers repository says everything about its denoiser. A plain weight
# file says nothing, so its architecture and schedule are given, as the repository that it comes from states them. The tag is
# resolved to the commit that it points to now, and every file is pinned by its sha256.

# %%
# !rsrouter wrap --denoiser hf-hub:org/denoiser@v1 --denoiser-filename unet.safetensors \
#     --denoiser-architecture small_unet --denoiser-kwargs '{"width": 8}' --denoiser-licence apache-2.0 \
#     --diffusion '{"schedule": "linear", "steps": 1000, "rescale_timesteps": false}' \
#     --classifier hf-hub:org/clean-classifier@v1 --sigma 0.25,0.5,1 \
#     --data validation.npz --images 40 --out pool.json

# %% [markdown]
# `t` is the first time step whose noise is at least sigma's. The accuracy under noise is measured on the data that was named:
# it is what each expert starts from.
#
# ## Train, certify, report
#
# `--kind cascade` trains nothing; it chooses the order of the experts and the thresholds on validation images.

# %%
# !rsrouter train pool.json --data train.npz --validation validation.npz --kind cascade --radii 0:1:0.25 \
#     --n 500 --out router

# %%
# !rsrouter certify router --data test.npz --radii 0:1:0.25 --n 500 --experts --out run

# %%
# !rsrouter report run --data test.npz --title "One denoiser, one classifier, three noise levels" --out run/report

# %%
from IPython.display import SVG

SVG("run/report/curve.svg")

# %% [markdown]
# ## Publish, and load by name
#
# The experts are on the Hub already, so only the router goes there, with its tables and a card. The card names both parts of
# every expert, their commits and their licences.

# %%
# !rsrouter publish run org/router

# %%
from rsrouter import FixedPlan, RoutedSmooth

theirs = RoutedSmooth.from_pretrained("org/router")  # fetches the denoiser and the classifier once, and checks both
print(theirs.describe())
pixels, _ = load_slice("test").batch(range(2))
for certificate in theirs.certify(pixels, FixedPlan(n0=50, n=500)):
    print(CLASSES[certificate.predict] if certificate.predict >= 0 else "no class", certificate.radius)

# %%
hub.stop()

# %% [markdown]
# Denoisers from diffusers, improved-diffusion and guided-diffusion: [Denoisers](../guide/denoisers.md). Classifiers from timm,
# transformers, torchvision and open_clip: [Experts as the Hub has them](../guide/hub-experts.md).
