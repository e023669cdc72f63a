"""The same votes in this process and in another."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from rsrouter.core import VoteRequest
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.sampling import Engine, Execution, VoteModel, image_identity

SHAPE = (1, 12, 12)
VOTES = 170


def draw(indices, dtype):
    """Counts of some of four images, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = SmallResNet(4, 1, width=8, blocks=((8, 2),)).eval()
    x = torch.rand((4, *SHAPE), generator=torch.Generator().manual_seed(1))[indices]
    engine = Engine([VoteModel("net", module, 0.5, ("net",), (4,), "d")], SHAPE, seed=0, execution=Execution(dtype=dtype))
    asked = [VoteRequest(i, "net", "estimate", 0, VOTES) for i in range(len(x))]
    return [counts["net"].tolist() for counts in engine.run(x, [image_identity(image) for image in x], asked)]


def test_votes_have_the_same_bits_in_this_process_and_in_another():
    threads = torch.get_num_threads()
    here = {dtype: draw([0, 1, 2, 3], dtype) for dtype in ("float32", "bfloat16")}
    torch.set_num_threads(threads)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        jobs = {(dtype, part): pool.submit(draw, list(part), dtype) for dtype in here for part in ((2, 0), (3, 1))}
        for (dtype, part), job in jobs.items():
            assert job.result() == [here[dtype][i] for i in part]
