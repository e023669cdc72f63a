"""Odd and hostile data, each with the outcome it must have: the right labels and pixels, or a refusal in words.

A case is what builds it, what `load_data` is told, and what must come: `Read` with labels, classes, the first pixels and a
warning, or the words of an InputError. Reading a case covers all of it: labels, every image, and the fingerprint.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rsrouter.core.errors import InputError
from rsrouter.data import load_data
from tests.helpers.odd_folders import FOLDERS
from tests.helpers.odd_inputs import Case
from tests.helpers.odd_tables import TABLES

CASES = {**FOLDERS, **TABLES}


def read(case: Case, folder: Path) -> tuple[Any, Any, Any]:
    """The data, and all images and labels of it."""
    data = load_data(case.build(folder), **case.options)
    return data, *data.batch(data.readable())


@pytest.mark.parametrize("name", CASES)
def test_every_input_has_its_outcome(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = tmp_path / "d"
    folder.mkdir()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if isinstance(case.outcome, str):
            with pytest.raises(InputError, match=f"(?s){case.outcome}") as caught:
                read(case, folder)
            error = caught.value
            assert error.message
            assert error.expected
            assert error.remedy
            assert str(error).isprintable()
            return
        data, images, labels = read(case, folder)
        assert len(data.fingerprint) == 64
    outcome = case.outcome
    assert labels.tolist() == outcome.labels
    if outcome.classes is not None:
        assert data.classes == outcome.classes
    if outcome.shape is not None:
        assert images.shape[1:] == outcome.shape
    assert images.dtype == torch.float32
    if outcome.first is not None:
        assert (images[0, 0].flatten() * 255).round().int().tolist()[: len(outcome.first)] == outcome.first
    texts = [str(w.message) for w in told if issubclass(w.category, UserWarning)]
    if outcome.warns:
        assert any(re.search(outcome.warns, text) for text in texts), texts
    else:
        assert not texts
    assert all(text.isprintable() for text in texts)


def test_the_corpus_is_large() -> None:
    assert len(CASES) == len(FOLDERS) + len(TABLES) >= 190
