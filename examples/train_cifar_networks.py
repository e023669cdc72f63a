"""Train networks of a CIFAR-10 router's own by the methods that lead at large radii: what the second study's router asks first.

    python examples/train_cifar_networks.py queue --data DATA --out RUNS --jobs examples/cifar_study_jobs.json
    python examples/train_cifar_networks.py train --data DATA --out RUNS --name NAME --recipe cat-rs --sigma 0.6 \
        --start EXPERTS/sigma_0.50

DATA and the split of its rows are those of `train_cifar_experts.py`; of the validation rows, 49,000 to 49,999 choose the best
state here, and 48,000 to 48,999, on which routers are chosen, are not read. Recipes and how a run goes on: `expert_training.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from expert_training import Task, command_line
from torch import Tensor
from train_cifar_experts import MEAN, STD, read_cifar


def read(data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and those on which the best state is chosen."""
    (images, labels), (later, truth) = read_cifar(data, "experts"), read_cifar(data, "validation")
    x, other = (torch.from_numpy(np.ascontiguousarray(i)).float().div_(255) for i in (images, later[1000:]))
    return x, torch.from_numpy(labels), other, torch.from_numpy(truth[1000:])


TASK = Task("CIFAR-10, training rows 0 to 41,999", (3, 32, 32), MEAN, STD, read)


if __name__ == "__main__":
    command_line(TASK, __doc__)
