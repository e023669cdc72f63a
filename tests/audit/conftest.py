"""A run whose experts lie in files, so that an audit can load it without a Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rsrouter import ExpertPool
from rsrouter.data import ImageData
from tests.helpers import small_router as small

COUNT = 16


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    pool = ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])
    small.run_folder(small.routed(pool), folder, small.images(COUNT))
    return folder


@pytest.fixture(scope="session")
def data() -> ImageData:
    return small.images(COUNT)


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Path:
    """A copy of the run to tamper with."""
    shutil.copytree(clean, tmp_path / "run")
    return tmp_path / "run"
