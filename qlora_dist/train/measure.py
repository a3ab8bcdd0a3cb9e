"""How far a merged model is from the one that was trained."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional

from qlora_dist.data.build import open_corpus
from qlora_dist.data.tokens import Sample
from qlora_dist.errors import ModelError
from qlora_dist.layout import RunDir
from qlora_dist.sizes import GIB
from qlora_dist.spec import LoraAdapter, RunSpec
from qlora_dist.train.adapters import add_adapter, trainable
from qlora_dist.train.batch import IGNORE, make_batch
from qlora_dist.train.consolidate import PEFT_WEIGHTS
from qlora_dist.train.evaluate import evaluation_mode
from qlora_dist.train.load import load_base
from qlora_dist.train.ticker import Ticker

# Bounds what the trained model's log-probabilities take: 1 GiB for a vocabulary of 131,072.
MAX_TARGETS = 2048
# One sample at a time, so that every kernel would do; both models are given the same.
_ATTENTION = "sdpa"
# Left on a GPU for one sample's activations and logits.
_SPARE_BYTES = 4 * GIB


@dataclass(frozen=True)
class Rows:
    """What is measured on.

    Attributes:
        samples: The first samples, as many as it takes.
        source: What they are, for a person.
        num_targets: Target tokens that count, the first of ``samples``; at most ``MAX_TARGETS``.
    """

    samples: Sequence[Sample]
    source: str
    num_targets: int


@dataclass(frozen=True)
class Trained:
    """The trained model's answer.

    Attributes:
        log_probs: A float32 tensor of shape ``(targets, vocab)`` a sample, on the CPU.
        perplexity: exp of the mean cross-entropy of the targets.
    """

    log_probs: Sequence[torch.Tensor]
    perplexity: float


@dataclass(frozen=True)
class Figures:
    """A merged model against the trained one.

    Attributes:
        kl_nats: Mean over the target tokens of KL(trained || merged).
        perplexity: exp of the mean cross-entropy of the targets.
    """

    kl_nats: float
    perplexity: float


def choose_rows(run: RunDir, spec: RunSpec) -> Rows:
    """The run's held-out samples, or its first training samples where none are held out.

    Raises:
        DataError: The corpus is missing or malformed.
    """
    samples, source = _samples(run, spec)
    chosen: list[Sample] = []
    count = 0
    for sample in samples:
        if count >= MAX_TARGETS:
            break
        chosen.append(sample)
        count += sample.num_targets
    return Rows(chosen, f"{len(chosen)} {source}", min(count, MAX_TARGETS))


def measure_trained(run: RunDir, spec: RunSpec, rows: Rows, ticker: Ticker) -> Trained:
    """Load base and adapter as they were trained, and let them predict the targets.

    Raises:
        ModelError: The base is missing or does not fit, or the adapter is not one for it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load_trained(run, spec, device)
    log_probs: list[torch.Tensor] = []
    losses: list[float] = []
    with ticker.stage("measuring the trained model", len(rows.samples), "sample") as tick:
        # As in training.
        mixed = spec.model.dtype == "bf16"
        for found, targets in _predict(
            model, rows, lambda: torch.autocast(device.type, torch.bfloat16, enabled=mixed)
        ):
            losses.append(_loss(found, targets))
            log_probs.append(found.cpu())
            tick()
    del model
    _free()
    return Trained(log_probs, math.exp(math.fsum(losses) / rows.num_targets))


def measure_merged(
    folder: Path, spec: RunSpec, rows: Rows, trained: Trained, ticker: Ticker, *, name: str
) -> Figures:
    """Load a merged folder with transformers, and compare it with the trained model.

    Raises:
        ModelError: The folder does not load whole, or its logits are not finite.
    """
    model = _load_merged(folder, spec, ticker)
    losses: list[float] = []
    divergences: list[float] = []
    with ticker.stage(f"measuring {name}", len(rows.samples), "sample") as tick:
        for (found, targets), wanted in zip(
            _predict(model, rows, nullcontext), trained.log_probs, strict=True
        ):
            losses.append(_loss(found, targets))
            divergences.append(_divergence(wanted.to(found.device), found))
            tick()
    del model
    _free()
    divergence = math.fsum(divergences) / rows.num_targets
    if not math.isfinite(divergence):
        raise ModelError(
            f"{name}: the merged model's logits are not finite in its 16 bits; train from a base "
            "in bfloat16, or keep the adapter apart from the base"
        )
    return Figures(divergence, math.exp(math.fsum(losses) / rows.num_targets))


def _samples(run: RunDir, spec: RunSpec) -> tuple[Sequence[Sample], str]:
    """Samples to measure on, and what they are."""
    corpus = open_corpus(run, spec)
    if corpus.validation:
        return corpus.validation, "held-out samples"
    return corpus.train, f"training samples of {run.root.name}, which holds none out"


def _load_trained(run: RunDir, spec: RunSpec, device: torch.device) -> Any:
    base = load_base(spec, device=device, attention=_ATTENTION)
    assert isinstance(spec.adapter, LoraAdapter)
    model = add_adapter(base, spec.adapter, seed=spec.seed, device=device)
    parameters = trainable(model)
    with safe_open(run.adapter / PEFT_WEIGHTS, "pt") as file:
        if odd := sorted(set(parameters) ^ set(file.keys())):
            raise ModelError(f"{run.adapter} is not an adapter for this base: {odd[:3]}")
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(name))
    return model


def _load_merged(folder: Path, spec: RunSpec, ticker: Ticker) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=_ATTENTION,
            device_map={"": _device_for(folder, ticker)},
            use_safetensors=True,
            trust_remote_code=spec.model.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"the merged model cannot be loaded: {error}") from error
    if odd := {what: sorted(map(str, names))[:3] for what, names in info.items() if names}:
        raise ModelError(f"the merged model does not load whole: {odd}")
    return model


def _device_for(folder: Path, ticker: Ticker) -> torch.device:
    """The GPU where the merged model fits on it: it takes four times what training's base took."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = torch.cuda.mem_get_info()[0]
    if size + _SPARE_BYTES <= free:
        return torch.device("cuda")
    ticker.say(
        f"the merged model takes {size / GIB:.1f} GiB, the GPU has {free / GIB:.1f} GiB free: it "
        "is measured on the CPU"
    )
    return torch.device("cpu")


def _predict(
    model: Any, rows: Rows, autocast: Callable[[], AbstractContextManager[Any]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities, float32 of shape ``(targets, vocab)``, and targets of each sample."""
    left = rows.num_targets
    for sample in rows.samples:
        batch = make_batch([[sample]], flat=False, pad_id=0, device=model.device)
        with evaluation_mode(model), torch.no_grad(), autocast():
            logits = model(input_ids=batch.input_ids).logits
        places = (batch.targets[0] != IGNORE).nonzero().flatten()[:left]
        left -= len(places)
        yield (
            functional.log_softmax(logits[0, places].float(), dim=-1),
            batch.targets[0, places],
        )


def _loss(log_probs: torch.Tensor, targets: torch.Tensor) -> float:
    """Cross-entropy, summed over the targets."""
    return -float(log_probs.gather(1, targets[:, None]).double().sum())


def _divergence(trained: torch.Tensor, merged: torch.Tensor) -> float:
    """KL(trained || merged), summed over the targets."""
    return float((trained.exp() * (trained - merged)).sum(-1).double().sum())


def _free() -> None:
    """Give a model's memory back before the next one is loaded."""
    # PEFT's wrappers point at each other.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
