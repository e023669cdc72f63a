"""Ensembles, denoised experts and one model at several sigmas: what they compute, and that their pins hold."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rsrouter.core.errors import CheckpointError, InputError, IntegrityError
from rsrouter.experts import (
    Diffusion,
    Ensemble,
    Expert,
    ExpertPool,
    at_sigmas,
    build_architecture,
    denoised,
    ensemble,
    load_denoiser,
    load_expert,
)
from rsrouter.experts.preprocessing import Resize
from rsrouter.experts.small_resnet import SmallResNet

SMALL = {"width": 8, "blocks": [[8, 2]]}


def member(folder: Path, seed: int) -> Expert:
    torch.manual_seed(seed)
    save_file(SmallResNet(**SMALL).state_dict(), folder / f"m{seed}.safetensors")  # type: ignore[arg-type]
    return load_expert(
        folder / f"m{seed}.safetensors",
        name=f"m{seed}",
        architecture="small_resnet",
        kwargs=SMALL,
        sigma=0.5,
        input_shape=(1, 28, 28),
        mean=[0.1 * seed],
        std=[0.3],
    )


@pytest.fixture
def members(tmp_path: Path) -> list[Expert]:
    return [member(tmp_path, seed) for seed in range(4)]


@pytest.fixture
def x() -> Tensor:
    return torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(2))


def test_ensemble_is_the_mean_of_logits(members: list[Expert], x: Tensor) -> None:
    expert = ensemble(members)
    with torch.no_grad():
        torch.testing.assert_close(expert.network()(x), torch.stack([m.network()(x) for m in members]).mean(0))
    assert expert.module.members[1][1] is members[1].module  # type: ignore[index, union-attr]


class Table(nn.Module):
    """Logits from the first pixel: row `int(x)` of a table. Counts the rows it was asked for."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows, self.asked = torch.tensor(rows), 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.rows[x[:, 0, 0, 0].long()]


def test_consensus_stops_where_the_first_agree() -> None:
    # image 0: the first two agree on class 0; image 1: they differ; image 2: they agree on 1, the third would overrule
    first = Table([[3.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])
    second = Table([[2.0, 1, 0], [0, 2.0, 0], [0, 1.0, 0]])
    third = Table([[0, 0, 9.0], [0, 0, 9.0], [0, 0, 9.0]])
    module = Ensemble([first, second, third], consensus=2, chunk=4)
    x = torch.tensor([0.0, 1, 2, 1, 0]).view(-1, 1, 1, 1)
    out = module(x)
    assert out.argmax(1).tolist() == [0, 2, 1, 2, 0]
    torch.testing.assert_close(out[0], torch.tensor([2.5, 0.5, 0.0]))
    torch.testing.assert_close(out[1], torch.tensor([1.0, 2.0, 9.0]) / 3)
    assert (first.asked, third.asked) == (5, 4)  # two undecided images in one chunk of four
    third.asked = 0
    module(x[[0, 2, 4]])
    assert third.asked == 0


def test_consensus_of_a_vote_does_not_depend_on_its_company(x: Tensor) -> None:
    torch.manual_seed(0)
    members = [
        Expert(nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), sigma=0.5, num_classes=3, input_shape=(1, 28, 28))
        for _ in range(4)
    ]
    expert = ensemble(members, consensus=2, chunk=8)
    x = x - 0.5
    network = expert.network()
    with torch.no_grad():
        whole = network(x)
        first = [m.network()(x).argmax(1) for m in members[:2]]
        assert 0 < int((first[0] != first[1]).sum()) < len(x)  # both branches are taken
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(network(x[order]), whole[order])
        for i in range(0, len(x), 7):
            torch.testing.assert_close(network(x[i : i + 1])[0], whole[i])
        mean = torch.stack([m.network()(x) for m in members]).mean(0)
    differ = first[0] != first[1]
    torch.testing.assert_close(whole[differ], mean[differ])


def test_nan_of_a_member_reaches_the_vote() -> None:
    bad = Table([[math.nan, 0, 0]] * 2)
    good = Table([[0, 1.0, 0]] * 2)
    x = torch.tensor([0.0, 1]).view(-1, 1, 1, 1)
    for order in ([bad, good, good], [good, bad, good]):
        assert torch.isnan(Ensemble(order, consensus=2)(x)).any(1).all()
    assert torch.isnan(Ensemble([good, good, bad])(x)).any(1).all()


@pytest.mark.parametrize("consensus", [0, 1, 4, 5, 2.5])
def test_consensus_that_does_not_fit(members: list[Expert], consensus: object) -> None:
    with pytest.raises(InputError, match="K-consensus"):
        ensemble(members, consensus=consensus)  # type: ignore[arg-type]


def test_members_that_do_not_fit(members: list[Expert]) -> None:
    other = Expert(members[0].module, sigma=1.0, num_classes=10, input_shape=(1, 28, 28))
    with pytest.raises(InputError, match="sigma"):
        ensemble([members[0], other])
    assert ensemble([members[0], other], sigma=0.5).sigma == 0.5
    with pytest.raises(InputError, match="at least 2"):
        ensemble(members[:1])


def test_ensemble_pool_round_trip(members: list[Expert], x: Tensor, tmp_path: Path) -> None:
    expert = ensemble(members, consensus=2, name="e")
    pool = ExpertPool([expert, members[0]])
    pool.save(tmp_path)
    again = ExpertPool.load(tmp_path)
    assert again.digest == pool.digest
    assert torch.equal(again["e"].network()(x), expert.network()(x))
    content = json.loads((tmp_path / "pool.json").read_text())
    entry = next(e for e in content["experts"] if e["name"] == "e")
    assert [p["provenance"]["location"] for p in entry["provenance"]["parts"]] == ["."] * 4
    entry["provenance"]["parts"][1]["mean"] = [0.9]
    (tmp_path / "pool.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="digest"):
        ExpertPool.load(tmp_path)


def test_experts_travel_to_worker_processes(members: list[Expert], x: Tensor) -> None:
    pool = ExpertPool([ensemble(members, consensus=2, name="e"), members[0]])
    again = pickle.loads(pickle.dumps(pool))
    assert again.digest == pool.digest
    assert again[0].provenance == pool[0].provenance
    assert torch.equal(again["e"].network()(x), pool["e"].network()(x))


def test_part_of_an_ensemble_is_verified(members: list[Expert], tmp_path: Path) -> None:
    ExpertPool([ensemble(members)]).save(tmp_path)
    members.clear()
    data = bytearray((tmp_path / "m2.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m2.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="m2"):
        ExpertPool.load(tmp_path)


# -- denoised ------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """A perfect denoiser of one known image: returns what the schedule says the network should."""

    def __init__(self, clean: Tensor, diffusion: Diffusion, how: str) -> None:
        super().__init__()
        self.clean, self.abar, self.how = 2 * clean - 1, diffusion.alphas_cumprod().float(), how

    def forward(self, x_t: Tensor, t: Tensor) -> object:
        abar = self.abar[t].view(-1, 1, 1, 1)
        noise = (x_t - abar.sqrt() * self.clean) / (1 - abar).sqrt()
        out = {
            "epsilon": noise,
            "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * self.clean,
            "sample": self.clean.expand_as(x_t),
        }
        value = out[self.how]
        return torch.cat([value, torch.zeros_like(value)], 1) if self.how == "epsilon" else (value,)


@pytest.mark.parametrize("how", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_one_shot_denoising_formula(how: str, schedule: str) -> None:
    """A perfect denoiser gives the clean image back, whatever it predicts (PEERS: Carlini et al.)."""
    diffusion = Diffusion(schedule, prediction=how, learned_variance=how == "epsilon")
    clean = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classifier = Expert(nn.Flatten(), sigma=0.5, num_classes=192, input_shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
    expert = denoised(Oracle(clean, diffusion, how), classifier, sigma=0.5, diffusion=diffusion)
    z = clean + 0.5 * torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(expert.network()(z), ((clean - 0.5) / 0.25).flatten(1).expand(5, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_time_step_matches_the_noise(sigma: float, schedule: str) -> None:
    t, abar = Diffusion(schedule).step_for(sigma)
    assert math.sqrt((1 - abar) / abar) == pytest.approx(2 * sigma, rel=0.02)
    assert 0 < t < 1000


def test_linear_schedule_reference() -> None:
    """The product of (1 - beta_t), beta linear from 1e-4 to 0.02 (Ho et al. 2020, section 4), multiplied out in Python."""
    product, abar = 1.0, Diffusion().alphas_cumprod()
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        if t in (0, 10, 500, 999):
            assert float(abar[t]) == pytest.approx(product, rel=1e-9)


def test_sigma_outside_the_schedule() -> None:
    for sigma in (0.001, 200.0):
        with pytest.raises(InputError, match="schedule"):
            Diffusion().step_for(sigma)
    with pytest.raises(InputError, match="Unusable diffusion"):
        Diffusion("quadratic")


def test_denoised_experts_share_weights_and_round_trip(tmp_path: Path, members: list[Expert], x: Tensor) -> None:
    torch.manual_seed(0)
    unet = build_architecture("small_unet", 2, {"width": 8})
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    denoiser = load_denoiser(tmp_path / "unet.safetensors", architecture="small_unet", kwargs={"width": 8}, licence="mit")
    pool = ExpertPool([denoised(denoiser, members[1], sigma=s, diffusion=Diffusion()) for s in (0.25, 0.5)])
    assert pool[0].module.denoiser is pool[1].module.denoiser
    assert pool[0].digest != pool[1].digest
    pool.save(tmp_path)
    again = ExpertPool.load(tmp_path)
    assert again.digest == pool.digest
    assert again[0].module.denoiser is again[1].module.denoiser
    assert torch.equal(again[1].network()(x), pool[1].network()(x))
    with pytest.raises(InputError, match="each sigma"):
        at_sigmas(pool[0], [0.25, 0.5])
    with pytest.raises(CheckpointError, match="not a denoiser"):
        load_denoiser(tmp_path / "unet.safetensors", architecture="small_resnet")


def test_dncnn_before_a_classifier(members: list[Expert], x: Tensor) -> None:
    denoiser = build_architecture("dncnn", 2, {"depth": 3, "n_channels": 4, "image_channels": 1}).eval()
    expert = denoised(denoiser, members[1], sigma=0.5)
    with torch.no_grad():
        torch.testing.assert_close(expert.network()(x), members[1].network()(x - denoiser.dncnn(x)))
    assert expert.provenance is None  # a module made in memory cannot be pinned


def test_resized_for_the_classifier() -> None:
    diffusion = Diffusion(learned_variance=True)
    clean = torch.full((1, 3, 8, 8), 0.25)
    oracle = Oracle(clean, diffusion, "epsilon")
    told: dict[str, Any] = {"sigma": 0.5, "num_classes": 768}
    classifier = Expert(nn.Flatten(), input_shape=(3, 8, 8), resize=Resize(size=(16, 16)), **told)
    expert = denoised(oracle, classifier, sigma=0.5, diffusion=diffusion)
    assert expert.input_shape == (3, 8, 8)
    torch.testing.assert_close(expert.network()(clean + 0.1), torch.full((1, 768), 0.25), rtol=1e-3, atol=1e-3)
    other = Expert(nn.Flatten(), input_shape=(3, 16, 16), **told)
    with pytest.raises(InputError, match="different images") as caught:
        denoised(oracle, other, sigma=0.5, diffusion=diffusion, input_shape=(3, 8, 8))
    assert "input_size=(8, 8)" in caught.value.remedy


def test_one_model_at_several_sigmas(members: list[Expert], tmp_path: Path) -> None:
    pool = ExpertPool(at_sigmas(members[0], [0.5, 0.25, 1.0]))
    assert pool.sigmas == (0.25, 0.5, 1.0)
    assert len({id(e.module) for e in pool}) == 1
    assert len({e.digest for e in pool}) == 3
    pool.save(tmp_path)
    again = ExpertPool.load(tmp_path)
    assert again.digest == pool.digest
    assert len({id(e.module) for e in again}) == 1
    with pytest.raises(InputError, match="sigma"):
        at_sigmas(members[0], [0.5, -1.0])


class Sampled(nn.Module):
    """Answers as diffusers' UNets do: an object with `.sample`."""

    def forward(self, x_t: Tensor, t: Tensor) -> object:
        from types import SimpleNamespace

        return SimpleNamespace(sample=x_t * 0.1 + t.view(-1, 1, 1, 1) * 1e-4)


@pytest.mark.parametrize("kind", ["mean", "consensus", "unet", "sampled", "dncnn"])
def test_what_the_engine_prepares_is_the_same_function(kind: str, members: list[Expert], x: Tensor) -> None:
    """Tracing and folding must not change what a composite computes."""
    from rsrouter.sampling.execution import Execution, prepare

    torch.manual_seed(0)
    expert = {
        "mean": lambda: ensemble(members),
        "consensus": lambda: ensemble(members, consensus=2),
        "unet": lambda: denoised(
            build_architecture("small_unet", 2, {"width": 8}).eval(), members[1], sigma=0.5, diffusion=Diffusion()
        ),
        "sampled": lambda: denoised(Sampled(), members[1], sigma=0.5, diffusion=Diffusion()),
        "dncnn": lambda: denoised(
            build_architecture("dncnn", 2, {"depth": 3, "n_channels": 4, "image_channels": 1}).eval(), members[1], sigma=0.5
        ),
    }[kind]()
    prepared = prepare(expert.network(), Execution(), torch.device("cpu"), x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), expert.network()(x), rtol=1e-3, atol=1e-4)
