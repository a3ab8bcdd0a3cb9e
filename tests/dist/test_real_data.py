"""The published files of two corpora: trained with two processes, stopped, resumed, loaded.

The files lie beside the repository (shared/data); these tests skip where they are not.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist import checkpoints
from qlora_dist.data.build import open_corpus
from qlora_dist.layout import RunDir, open_run
from qlora_dist.train.adapters import add_adapter, trainable
from qlora_dist.train.batch import make_batch
from qlora_dist.train.compare import differences
from qlora_dist.train.evaluate import evaluation_mode
from qlora_dist.train.load import load_base

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = {
    "self-instruct": DATA / "self_instruct_seed_tasks.jsonl",
    "oasst1": DATA / "oasst1_validation_dialogs.jsonl",
}


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_trains_stops_resumes_and_its_adapter_is_the_model(
    config, qlora, stop, name
):
    if not FILES[name].exists():
        pytest.skip(f"{FILES[name]} is not here")
    changes = {
        "data__source": str(FILES[name]),
        "data__format": name,
        "data__max_tokens": 128,
        "data__validation_rows": 8,
        "data__group_by_length": True,
    }
    whole, broken = (
        RunDir(config(part, **changes).with_suffix("")) for part in ("whole", "broken")
    )
    qlora("run", whole.root.with_suffix(".yaml"))
    qlora("run", broken.root.with_suffix(".yaml"), "--prepare")
    code, output = stop("resume", broken.root, count=4)
    assert code == 85, output
    qlora("resume", broken.root)
    assert differences(whole, broken) == []

    run, spec = open_run(broken.root)
    sample = open_corpus(run, spec).validation[0]
    batch = make_batch([[sample]], flat=False, pad_id=0, device=torch.device("cpu"))
    assert torch.equal(trained_logits(run, spec, batch), loaded_logits(run, spec, batch))


def trained_logits(run, spec, batch):
    """Of the model as the trainer builds it, with the last checkpoint's weights."""
    base = load_base(spec, device=torch.device("cpu"), attention="sdpa")
    model = add_adapter(base, spec.adapter, seed=spec.seed, device=torch.device("cpu"))
    newest = checkpoints.committed_paths(run.checkpoints)[0]
    weights = load_file(newest / "weights" / "00000.safetensors")
    for key, parameter in trainable(model).items():
        parameter.data.copy_(weights[key])
    with evaluation_mode(model), torch.no_grad():
        return model(input_ids=batch.input_ids).logits


def loaded_logits(run, spec, batch):
    """Of the base with the adapter folder, loaded as anybody would."""
    from peft import PeftModel

    base = load_base(spec, device=torch.device("cpu"), attention="sdpa")
    model = PeftModel.from_pretrained(base, run.adapter)
    with evaluation_mode(model), torch.no_grad():
        return model(input_ids=batch.input_ids).logits
