"""Tiny models, written once a session for each size whose structure they imitate."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from g4trainer import tiny

torch.set_num_threads(1)  # the models are too small to gain from more, and threads that wait for a core lose much

Folders = Callable[[tiny.Like], Path]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The model folder shaped like a size; tests must not write there."""
    made: dict[tiny.Like, Path] = {}

    def folder(like: tiny.Like) -> Path:
        if like not in made:
            made[like] = tmp_path_factory.mktemp("models") / f"tiny-{like}"
            tiny.write_model(made[like], like=like)
        return made[like]

    return folder
