"""What several files of tests share, made once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs.prepare's model and recipe, and the run `nft` by it."""
    from runs import prepare  # imports torch, which most tests do without

    root = tmp_path_factory.mktemp("sums")
    prepare(root)
    return root
