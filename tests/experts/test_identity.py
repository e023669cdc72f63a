"""Identity by value: what decides a vote is told, where a file or class lies and what a library adds to its layers is not."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from rsrouter.core.certify import VoteRequest
from rsrouter.core.errors import CheckpointError, NetworkError
from rsrouter.experts import (
    Expert,
    ExpertPool,
    build_architecture,
    module_digest,
    module_identity,
    register_architecture,
    save_expert,
    unique_digest,
)
from rsrouter.experts.describe import describe_module
from rsrouter.experts.loaders import load_expert
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.router import DeferralRouter, FlatRouter, MLPHead, Voter, single_tree
from rsrouter.sampling import Engine, Execution
from rsrouter.sampling.memo import VoteMemo

SCALE = 2.0
SHARED: list[float] = [1.0]
SHAPE = (1, 4, 4)


def doubled(x: Tensor) -> Tensor:
    return x * SCALE


class Held(nn.Module):
    """A network that holds something as a plain attribute."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x.flatten(1))[:, :3]  # type: ignore[operator]


class Rolled(nn.Module):
    """Which class wins stands in a whole number that no constructor names."""

    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.shift = settings["by"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([5.0, 0.0, 0.0]).expand(len(x), 3).roll(self.shift, 1)


def expert(module: nn.Module, **settings: object) -> Expert:
    return Expert(module, **{"sigma": 0.5, "num_classes": 3, "input_shape": SHAPE, **settings})  # type: ignore[arg-type]


def constant(k: int) -> nn.Linear:
    layer = nn.Linear(16, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(5.0 * nn.functional.one_hot(torch.tensor(k), 3))
    return layer


class Members(nn.Module):
    def __init__(self, k: int, kind: str) -> None:
        super().__init__()
        layers = [constant(k), constant(k)]
        kinds = {"list": layers, "tuple": tuple(layers), "dict": dict(enumerate(layers)), "ModuleList": nn.ModuleList(layers)}
        self.members = kinds[kind]

    def forward(self, x: Tensor) -> Tensor:
        members = self.members.values() if isinstance(self.members, dict) else self.members
        return sum(m(x.flatten(1)) for m in members)  # type: ignore[return-value]


def votes(one: Expert, memo: VoteMemo) -> list[int]:
    routed = single_tree(one)
    engine = Engine(routed.models, SHAPE, seed=1, execution=Execution(batch=20))
    request = VoteRequest(0, one.name, "estimate", 0, 40)
    (counts,) = memo.run(engine, torch.zeros(1, *SHAPE), [b"image"], [request])
    return next(iter(counts.values())).tolist()


PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "function": lambda: (Held(torch.tanh), Held(torch.neg)),
    "number": lambda: (Rolled(by=0), Rolled(by=1)),
    **{
        kind: functools.partial(lambda k: (Members(0, k), Members(1, k)), kind)
        for kind in ("list", "tuple", "dict", "ModuleList")
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_different_networks_keep_their_own_votes(name: str) -> None:
    one, other = (expert(module, name="e") for module in PAIRS[name]())
    assert one.digest != other.digest
    assert one.opaque == other.opaque == ()
    again = expert(PAIRS[name]()[0], name="e")
    assert again.digest == one.digest  # made anew, and seen to be equal
    if name in ("list", "tuple", "dict"):  # such weights are seen; the engine runs no network that keeps them
        held = one.module.members  # type: ignore[union-attr]
        next(iter(held.values() if isinstance(held, dict) else held)).bias.data += 1
        with pytest.raises(NetworkError, match="changed"):
            one.check_unchanged()
        return
    memo = VoteMemo()
    first, second = votes(one, memo), votes(other, memo)
    assert first == votes(one, VoteMemo())
    assert second == votes(other, VoteMemo())
    assert name == "function" or first != second
    assert votes(again, memo) == first


def make_closure(value: object) -> Callable[[Tensor], Tensor]:
    return lambda x: x * value  # type: ignore[operator]


class Slotted:
    __slots__ = ("__b", "a")

    def __init__(self, a: int, b: int) -> None:
        self.a, self.__b = a, b


def in_slices(x: Tensor) -> Tensor:
    return x[:, :2]


DIFFERENT = [
    (torch.relu, torch.tanh),
    (nn.functional.gelu, nn.functional.silu),
    (np.tanh, np.sin),
    (torch.Tensor.relu, torch.Tensor.tanh),
    (torch.ops.aten.relu, torch.ops.aten.tanh),
    (doubled, in_slices),
    (lambda x: x + 1, lambda x: x + 2),
    (make_closure(1.0), make_closure(2.0)),
    (make_closure(torch.zeros(2)), make_closure(torch.ones(2))),
    (functools.partial(torch.clamp, min=0.0), functools.partial(torch.clamp, min=1.0)),
    (Rolled(by=1).forward, Rolled(by=2).forward),
    (nn.GELU, nn.ReLU),
    (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    (Slotted(1, 2), Slotted(1, 3)),
    ({"a": [nn.Linear(2, 2, bias=False)]}, {"a": [nn.Linear(2, 2, bias=False)]}),
    ({1, 2}, {1, 3}),
    (torch.float16, torch.float32),
    (1, 1.0),
    (float("nan"), 0.0),
    (np.arange(3), np.arange(3.0)),
    (Path("a"), Path("b")),
    ([1, [2]], [[1], 2]),
]


@pytest.mark.parametrize("pair", DIFFERENT, ids=lambda pair: type(pair[0]).__name__)
def test_what_a_module_holds_is_told(pair: tuple[object, object]) -> None:
    one, other = module_identity(Held(pair[0])), module_identity(Held(pair[1]))
    assert one.digest != other.digest
    assert one.opaque == other.opaque == ()
    assert module_identity(Held(copy.deepcopy(pair[0]))) == one


def test_sets_do_not_depend_on_the_hash_seed() -> None:
    text = """if True:
        import torch
        from rsrouter.experts import module_digest
        module = torch.nn.Identity()
        module.names = {"a", "b", "c", "d", "e", "f"}
        print(module_digest(module))
        """
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    told = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True).stdout
    module = nn.Identity()
    module.names = {"a", "b", "c", "d", "e", "f"}  # type: ignore[assignment]
    assert module_digest(module) == told.strip()  # this process has a seed of its own
    orders = [{0, 8}, {8, 0}]
    assert [list(order) for order in orders] == [[0, 8], [8, 0]]
    one, other = nn.Identity(), nn.Identity()
    one.names, other.names = orders  # type: ignore[assignment]
    assert module_digest(one) == module_digest(other)


def test_global_names_that_a_function_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = module_identity(Held(doubled))
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert module_identity(Held(doubled)) != before
    assert before.opaque == ()


OPAQUE = [
    (torch.Generator(), "Generator"),
    (iter([1]), "list_iterator"),
    (np.array([object()]), "array of object"),
    (make_closure(SHARED), "a list that it shares"),
    (lambda x: x * SHARED[0], "a list that it shares"),
    (torch.zeros(2, device="meta"), "meta"),
    (torch.eye(2).to_sparse(), "cannot be read"),
    (torch.jit.trace(torch.relu, torch.zeros(1)), "cannot be read"),
]


@pytest.mark.parametrize(("held", "word"), OPAQUE, ids=[word for _, word in OPAQUE])
def test_what_cannot_be_read_makes_an_expert_unique(held: object, word: str) -> None:
    module = Held(held)
    one, other = expert(module), expert(module)
    assert word in one.opaque[0]
    assert one.opaque[0].startswith(("held", "the module"))
    assert one.digest != other.digest
    assert one.digest == one.digest
    one.check_unchanged()
    assert unique_digest(module) == unique_digest(module) != unique_digest(Held(held))


class WithGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


def test_worker_processes_agree_about_a_unique_expert() -> None:
    one = expert(WithGenerator())
    assert one.opaque
    there = pickle.loads(pickle.dumps(one))
    assert there.digest == one.digest
    there.check_unchanged()
    assert copy.deepcopy(one).digest != one.digest  # it may be changed in what cannot be read
    assert one.with_settings(name="b").digest == one.digest


def test_moving_a_class_changes_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's class, one of ours, and the digests of stored routers over it."""

    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    before = module_digest(Local())
    monkeypatch.setattr(Local, "__module__", "elsewhere.models")
    assert module_digest(Local()) == before

    torch.manual_seed(0)
    experts = [expert(build_architecture("small_resnet", 3, {"width": 8, "blocks": [[8, 2]]}), input_shape=(1, 28, 28))]
    head = build_architecture("mlp_head", 3, {"in_features": 11, "hidden": 2})
    hand_made = MLPHead(3, 11, 2)
    pool = ExpertPool(experts)
    routers = [DeferralRouter([Voter("sigma_0.5", head="h")], [], {"h": h}) for h in (head, hand_made)]
    before_all = [experts[0].digest, routers[0].digest, *(r.bind(pool).models[0].digest for r in routers)]
    for kind in (SmallResNet, MLPHead):
        monkeypatch.setattr(kind, "__module__", "rsrouter.somewhere.else_")
    monkeypatch.setitem(sys.modules, "rsrouter.somewhere.else_", types.SimpleNamespace(SmallResNet=SmallResNet, MLPHead=MLPHead))
    again = expert(experts[0].module, input_shape=(1, 28, 28))
    assert [again.digest, routers[0].digest, *(r.bind(ExpertPool([again])).models[0].digest for r in routers)] == before_all


def test_names_decide_nothing() -> None:
    """A router over the same networks under other names casts the same votes."""
    module = nn.Sequential(nn.Flatten(), constant(1))
    pools = [ExpertPool([expert(module, name=n), expert(module, sigma=1.0, name=m)]) for n, m in (("a", "b"), ("y", "x"))]
    routers = [FlatRouter(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), sigma=1.0)] * 2
    digests = [[m.digest for m in r.bind(p).models] for r, p in zip(routers, pools, strict=True)]
    assert digests[0] == digests[1]
    assert expert(module, labels=["a", "b", "c"]).network_digest == expert(module).network_digest
    assert expert(module, labels=["a", "b", "c"]).digest != expert(module).digest


# -- what is written down ----------------------------------------------------------------------------------------------


def test_written_and_made_in_memory_are_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = expert(build_architecture("small_resnet", 3, {"width": 8, "blocks": ((8, 2),)}), input_shape=(1, 28, 28))
    read = load_expert(save_expert(made, tmp_path / "e"))
    assert read.pinned
    assert not made.pinned
    assert read.digest == made.digest
    assert read.network_digest == made.network_digest


def test_the_kind_of_file_decides_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SmallResNet(3, width=8, blocks=((8, 2),))
    settings = {
        "architecture": "small_resnet",
        "kwargs": {"width": 8, "blocks": [[8, 2]]},
        "sigma": 0.5,
        "input_shape": (1, 28, 28),
    }
    torch.save({"state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}, tmp_path / "a.pth.tar")
    torch.save({k: v.double() for k, v in module.state_dict().items() if "num_batches" not in k}, tmp_path / "b.pt")
    digests = {load_expert(tmp_path / f, normalisation="none", **settings).digest for f in ("a.pth.tar", "b.pt")}
    assert len(digests) == 1


def changed_fc(m: nn.Module) -> None:
    m.fc = nn.Linear(8, 3, bias=False)


def changed_forward(m: nn.Module) -> None:
    m.forward = types.MethodType(lambda self, x: torch.zeros(len(x), 3), m)


def changed_attribute(m: nn.Module) -> None:
    m.conv1.stride = (1, 1)  # type: ignore[union-attr]


def changed_hook(m: nn.Module) -> None:
    m.fc.register_forward_hook(lambda module, args, out: -out)  # type: ignore[union-attr]


def changed_data(m: nn.Module) -> None:
    m.fc.weight.data += 1  # type: ignore[union-attr]


def changed_buffer(m: nn.Module) -> None:
    m.bn1.running_mean.add_(1)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [changed_fc, changed_forward, changed_attribute, changed_hook, changed_data, changed_buffer])
@pytest.mark.parametrize("pinned", [True, False])
def test_changes_in_place_are_noticed(change: Callable[[nn.Module], None], pinned: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = expert(build_architecture("small_resnet", 3, {"width": 8, "blocks": [[8, 2]]}).eval(), input_shape=(1, 28, 28))
    if pinned:
        one = load_expert(save_expert(one, tmp_path / "e"))
    before = one.digest
    one.check_unchanged()
    change(one.module)
    with pytest.raises(NetworkError, match="changed"):
        one.check_unchanged()
    assert module_digest(one.module) != before
    if change not in (changed_data, changed_buffer):
        with pytest.raises(CheckpointError, match="written down"):
            describe_module(one.module)
    if pinned:  # the file is what it was, and so is what is read from it
        again = load_expert(tmp_path / "e")
        assert again.module is not one.module
        again.check_unchanged()


@pytest.mark.parametrize(("name", "value"), [("sigma", 1.0), ("mean", (0.1,)), ("input_shape", (1, 2, 2))])
def test_changed_settings_are_noticed(name: str, value: object) -> None:
    one = expert(nn.Flatten(), mean=[0.5], std=[0.5])
    one.digest  # noqa: B018
    setattr(one, name, value)
    with pytest.raises(NetworkError, match="changed"):
        one.check_unchanged()


class Masked(nn.Module):
    """A constructor that draws what its state does not hold."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.mask = torch.rand(3)
        self.fc = nn.Linear(16, num_classes)


def test_a_constructor_that_draws_is_not_its_name() -> None:
    register_architecture("tests_masked", Masked)
    state = torch.random.get_rng_state()
    one, other = (build_architecture("tests_masked", 3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert module_digest(one) != module_digest(other)
    assert not torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(CheckpointError, match="written down"):
        describe_module(one)


# -- other releases of a library ---------------------------------------------------------------------------------------


def test_a_library_may_gain_attributes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As timm 1.0.31 did: another extra_repr, another attribute on a layer, a class in another file."""
    from timm.layers import BatchNormAct2d

    def build() -> Expert:
        torch.manual_seed(0)
        return expert(build_architecture("regnetx_002", 3), input_shape=(3, 32, 32))

    one = build()
    assert any(isinstance(m, BatchNormAct2d) for m in one.module.modules())
    folder = save_expert(one, tmp_path / "e")
    pool = ExpertPool([load_expert(folder)])
    pool.save(tmp_path)
    router = FlatRouter(build_architecture("regnetx_002", 1), sigma=1.0)
    before = one.digest, pool.digest, router.digest, [m.digest for m in router.bind(pool).models]
    init = BatchNormAct2d.__init__

    def more(self: nn.Module, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        self.new_setting = 7

    monkeypatch.setattr(BatchNormAct2d, "__init__", more)
    monkeypatch.setattr(BatchNormAct2d, "extra_repr", lambda self: "something=new")
    again, read = build(), ExpertPool.load(tmp_path)
    assert again.module.stem.bn.new_setting == 7
    stored = FlatRouter.from_config(router.to_config())
    stored.modules.load_state_dict(router.modules.state_dict())
    assert (again.digest, read.digest, stored.digest, [m.digest for m in stored.bind(read).models]) == before


def test_timm_names_are_one() -> None:
    assert timm.is_model("resnet18")
    torch.manual_seed(0)
    one = build_architecture("resnet18", 3)
    torch.manual_seed(0)
    assert module_digest(build_architecture("timm/resnet18.a1_in1k", 3)) == module_digest(one)


def test_a_stored_timm_router_has_its_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the script that is run under other releases does it, with one release."""
    import timm_versions

    monkeypatch.setattr(timm_versions, "CARDS", tmp_path)
    monkeypatch.setattr(timm_versions, "FAMILIES", {name: timm_versions.FAMILIES[name] for name in ("regnetx_002", "resnet10t")})
    timm_versions.write(tmp_path)
    assert timm_versions.check(tmp_path) == []
    told = json.loads((tmp_path / "digests.json").read_text())
    (tmp_path / "digests.json").write_text(json.dumps({**told, "pool": "0" * 64}))
    assert timm_versions.check(tmp_path) == ["the pool's digest"]
