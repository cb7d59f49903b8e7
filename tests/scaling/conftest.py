"""A corpus of random rows and its validation set, beside each other, for trials of the preset `tiny`."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed_rows import lognormal_lengths, packed_lengths, random_rows, write_dataset


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 1,200 rows of 64 tokens to train on."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, documents in (("train", 2000), ("valid", 20)):
        pieces = packed_lengths(lognormal_lengths(documents, median=20), 64)
        write_dataset(folder / name, random_rows(pieces, 512), 64, 512)
    return folder / "train"
