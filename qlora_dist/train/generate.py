"""Answers from a run, an adapter or a model folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dist.data.formats import prompt_of
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import ModelError, RunDirError
from qlora_dist.layout import RunDir, open_run
from qlora_dist.spec import LoraAdapter, RunSpec
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.consolidate import TRAINING, result_dir, result_name
from qlora_dist.train.evaluate import evaluation_mode
from qlora_dist.train.export import MARK
from qlora_dist.train.load import load_base


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        temperature: 0 picks the likeliest token.
        top_p: Nucleus sampling's mass, where temperature is not 0.
        seed: Of the sampling.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Generator:
    """A model that answers.

    Attributes:
        spec: Of the run that it comes from, whose prompt template it was trained with; None for a
            model of another origin, whose own chat template is used.
        raw: Give prompts as they are.
    """

    model: Any
    tokenizer: Any
    spec: RunSpec | None
    raw: bool

    def answer(
        self, prompt: str, sampling: Sampling, *, on_text: Callable[[str], None] | None = None
    ) -> str:
        """Answer a prompt.

        Args:
            prompt: The question, or with ``raw`` the text to go on from.
            sampling: How to choose tokens.
            on_text: Takes each piece of the answer as soon as it is known.

        Raises:
            ModelError: Prompt and answer do not fit into the model's positions.
        """
        ids = self._encode(prompt)
        positions = self.model.config.max_position_embeddings
        if ids.shape[1] + sampling.max_new_tokens > positions:
            room = positions - ids.shape[1]
            raise ModelError(
                f"the prompt has {ids.shape[1]} tokens, and with {sampling.max_new_tokens} new "
                f"ones does not fit into the model's {positions}; shorten it"
                + (f", or use --max-new-tokens {room}" if room > 0 else "")
            )
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
        torch.manual_seed(sampling.seed)
        pieces: list[str] = []
        takers = [pieces.append] if on_text is None else [pieces.append, on_text]
        with evaluation_mode(self.model):
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=_streamer(self.tokenizer, takers),
                use_cache=True,
                **options,
            )
        return "".join(pieces).strip()

    def _encode(self, prompt: str) -> torch.Tensor:
        """Token ids, int64 of shape ``(1, tokens)``, on the model's device."""
        text = prompt
        if self.spec is not None and not self.raw:
            text = prompt_of(self.spec.data.datasets[0], prompt)
        elif not self.raw and self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return torch.tensor([ids], device=self.model.device)


def open_generator(path: Path, *, base_only: bool = False, raw: bool = False) -> Generator:
    """Load what ``path`` holds: a run, an adapter, or a whole model.

    Raises:
        RunDirError: It holds none of these, or the run has no adapter yet.
        ModelError: The base is missing.
    """
    path = path.expanduser()
    if (path / "run.json").exists():
        run, spec = open_run(path)
        if not (base_only or isinstance(spec.adapter, LoraAdapter)):
            return _whole_model(_result_of(run, spec), raw=raw)
        return _with_adapter(spec, None if base_only else _result_of(run, spec), raw=raw)
    if (path / "adapter_config.json").exists():
        spec = _spec_of_adapter(path)
        return _with_adapter(spec, None if base_only else path, raw=raw)
    if (path / "config.json").exists():
        return _whole_model(path, raw=raw)
    raise RunDirError(f"{path} is no run directory, no adapter and no model folder")


def _streamer(tokenizer: Any, takers: Sequence[Callable[[str], None]]) -> Any:
    """A streamer that hands whole words to ``takers``."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            for take in takers:
                take(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _result_of(run: RunDir, spec: RunSpec) -> Path:
    folder = result_dir(run, spec)
    if not folder.exists():
        raise RunDirError(
            f"{run.root} has no {result_name(spec)} yet; write it with: qlora consolidate "
            f"{run.root}"
        )
    return folder


def _spec_of_adapter(path: Path) -> RunSpec:
    training = path / TRAINING
    if not training.exists():
        raise RunDirError(
            f"{path} was not made by this project: it has no training.json that says how its base "
            "was quantised. Load it with peft"
        )
    return _read_spec(training)


def _read_spec(path: Path) -> RunSpec:
    tree = json.loads(path.read_text(encoding="utf-8"))
    # The folder may be a stranger's: it does not decide on running code or on using a token.
    safe = ["model.trust_remote_code=false", "model.token_file=null"]
    return spec_from_tree(tree["spec"], safe, source=str(path))


def _with_adapter(spec: RunSpec, adapter: Path | None, *, raw: bool) -> Generator:
    from peft import PeftModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(spec)
    model = load_base(spec, device=device, attention="sdpa")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return Generator(model, tokenizer, spec, raw)


def _whole_model(path: Path, *, raw: bool) -> Generator:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", device_map={"": device}, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    marks = [path / name for name in (MARK, TRAINING) if (path / name).is_file()]
    spec = _read_spec(marks[0]) if marks else None
    return Generator(model, tokenizer, spec, raw)
