"""The random generators of a process: seeded, saved, put back."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_rng(*entropy: int) -> None:
    """Seed every generator from numbers, such as the run's seed and the rank."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """State of every generator that training may draw from, as tensors."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    mt = numpy_state["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*mt["key"].tolist(), mt["pos"], numpy_state["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put back what :func:`get_rng` gave."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *key, pos, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(key, np.uint32), pos, has_gauss, state["numpy_gauss"].item())
    )
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
