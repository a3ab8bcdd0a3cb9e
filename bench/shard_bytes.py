"""Whether sharded NF4 weights are the bytes that bitsandbytes makes of the whole on one device.

Run by torchrun, on GPUs where there are some. A small model, one of whose matrices packs to all
65,536 patterns of two bytes, is loaded by rows under fsdp. Then each layer is gathered as FSDP2
gathers it, on its own, in forward and backward passes, and after steps of the optimizer, and
compared with what one process makes. The last line is JSON: bytes compared, and those that differ;
and what the gathers of the steps brought in, beside what the plan says.
"""

import argparse
import json
import math
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from bitsandbytes import functional
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import unset_hf_deepspeed_config

from qlora_dist.engine_config import deepspeed_config
from qlora_dist.footprint import footprint
from qlora_dist.plan import Topology, make_plan
from qlora_dist.process import leave
from qlora_dist.shapes import shape_of_config
from qlora_dist.sizes import ZERO
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.adapters import add_adapter, trainable
from qlora_dist.train.load import DTYPES, empty_base, fill_base
from qlora_dist.train.lora import fuse
from qlora_dist.train.nf4 import Nf4Linear
from qlora_dist.train.optimizer import make_optimizer
from qlora_dist.train.place import Place
from qlora_dist.train.strategy import STRATEGIES
from qlora_dist.train.world import World

HIDDEN, INNER, LAYERS, VOCABULARY = 256, 1152, 3, 512
NUM_STEPS = 3


def all_patterns(rows, width):
    """A matrix that packs to every pattern of two bytes; blocks of 64 that each reach 1.0."""
    code = functional.get_4bit_type("nf4", device="cpu")
    patterns = torch.arange(65536)
    nibbles = torch.stack([patterns >> shift & 15 for shift in (12, 8, 4, 0)], dim=1)
    # 15 patterns a block, and a sixteenth that holds its largest value.
    blocks = torch.full((-(-65536 // 15), 16, 4), 15)
    flat = torch.full((len(blocks) * 15, 4), 15)
    flat[: len(nibbles)] = nibbles
    blocks[:, :15] = flat.view(-1, 15, 4)
    values = code[blocks.reshape(-1)]
    matrix = torch.randn(rows * width) * 0.02
    assert len(values) <= len(matrix)
    matrix[: len(values)] = values
    return matrix.view(rows, width)


def make_model(folder):
    """Write the model: biases on attention, and fewer heads for keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    gate = model.model.layers[1].mlp.gate_proj
    gate.weight.data = all_patterns(INNER, HIDDEN).to(torch.bfloat16)
    # Several files, as large models have.
    model.save_pretrained(folder, max_shard_size="2MB")


def make_spec(folder, *, kind, world_size, double, dtype, recompute):
    """The spec of the run that this stands for."""
    nodes = 2 if kind == "hsdp" else 1
    cpu = not torch.cuda.is_available()
    tree = {
        "name": "bytes",
        "model": {"source": str(folder), "dtype": dtype, "gradient_checkpointing": recompute},
        "quantization": {"kind": "nf4", "double": double},
        "adapter": {"r": 8},
        "data": {"source": "none", "format": "input-output", "max_tokens": 64},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "constant", "steps": 3},
        "strategy": {"kind": kind},
        "batch": {"global_size": 2 * world_size, "micro_size": 2},
        "resources": {
            "backend": "slurm" if nodes > 1 else "local",
            "time": "1:00:00" if nodes > 1 else None,
            "nodes": nodes,
            "gpus_per_node": 0 if cpu else world_size // nodes,
            "processes_per_node": world_size // nodes if cpu else None,
        },
    }
    return spec_from_tree(tree, source="shard_bytes")


def reference(folder, spec, device):
    """Bytes of every quantised matrix, made by bitsandbytes of the whole of it: name -> parts."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    made = {}
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            packed, state = functional.quantize_4bit(
                tensor.to(device, DTYPES[spec.model.dtype]),
                blocksize=64,
                quant_type="nf4",
                compress_statistics=spec.quantization.double,
            )
            made[name] = parts_of(packed, state)
    patterns = made["model.layers.1.mlp.gate_proj.weight"]["packed"].view(torch.int16)
    assert len(patterns.unique()) == 65536
    return made


def parts_of(packed, state):
    """Everything that the arithmetic reads of a matrix, as bytes."""
    parts = {"packed": packed, "absmax": state.absmax, "code": state.code}
    if state.nested:
        parts |= {"nested": state.state2.absmax, "map": state.state2.code}
        parts["offset"] = state.offset.reshape(1)
    return {
        key: part.detach().reshape(-1).contiguous().view(torch.uint8).cpu().clone()
        for key, part in parts.items()
    }


def accelerator(spec):
    """Accelerate's, with the settings that a run would have for DeepSpeed."""
    plan = make_plan(spec)
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(plan), zero3_init_flag=False)
    made = Accelerator(deepspeed_plugin=plugin)
    unset_hf_deepspeed_config()
    return made


@contextmanager
def gathered(layer, *, zero):
    """Have all of a decoder layer on every process for a while."""
    if zero:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(layer.parameters())):
            yield
        return
    layer.unshard()
    yield
    layer.reshard()


class Comparison:
    """Counts bytes that differ from the reference."""

    def __init__(self, wanted, damage):
        self.wanted, self.damage = wanted, damage
        self.compared = self.different = self.matrices = 0

    def look(self, name, weight):
        """Compare a gathered weight, with one bit flipped if that was asked for."""
        parts = parts_of(weight.flat(), weight.state())
        if self.damage:
            parts["packed"][0] ^= 1
        for key, wanted in self.wanted[name].items():
            assert parts[key].shape == wanted.shape, (name, key)
            self.compared += wanted.numel()
            self.different += int((parts[key] != wanted).sum())
        self.matrices += 1


class Received:
    """Counts bytes that this process receives of the others in FSDP2's gathers."""

    def __init__(self):
        self.bytes = 0
        # The name in torch 2.13, and before.
        names = ("all_gather_single", "all_gather_into_tensor")
        name = next(name for name in names if hasattr(torch.distributed, name))
        gather = getattr(torch.distributed, name)

        def counted(*args, **kwargs):
            whole = kwargs.get("output_tensor", args[0] if args else None)
            size = torch.distributed.get_world_size(kwargs.get("group"))
            self.bytes += whole.nbytes * (size - 1) // size
            return gather(*args, **kwargs)

        setattr(torch.distributed, name, counted)


def planned(spec, base, world, num_steps):
    """Bytes of the base that the plan says a process receives."""
    shape = shape_of_config(base.model.config.to_dict())
    found = footprint(
        spec,
        shape,
        world_size=world.size,
        gpus_per_node=world.size // world.num_nodes,
        accumulation=1,
        steps=num_steps,
    )
    return num_steps * next(line.bytes for line in found.network if line.name == "base")


def main():
    """Load, train three steps, compare all the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--single", dest="double", action="store_false", help="fp32 constants")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--kind", default="fsdp", choices=["fsdp", "hsdp", "zero2", "zero3"])
    parser.add_argument("--damage", action="store_true", help="flip a bit: the check must see it")
    args = parser.parse_args()
    place = Place.from_env()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    nodes = 2 if args.kind == "hsdp" else 1
    topology = Topology(nodes, place.size // nodes, "cuda" if cuda else "cpu")
    world = World.start(place, topology, timeout_s=300)
    name = tempfile.mkdtemp() if world.rank == 0 else ""
    folder = Path(world.from_rank_0(name))
    if world.rank == 0:
        make_model(folder)
    world.barrier()
    spec = make_spec(
        folder,
        kind=args.kind,
        world_size=world.size,
        double=args.double,
        dtype=args.dtype,
        recompute=args.recompute,
    )
    zero = args.kind in ZERO
    strategy = STRATEGIES[args.kind](world, spec, accelerator(spec) if zero else None)
    base = empty_base(spec, attention="sdpa", share=strategy.share)
    model = add_adapter(base.model, spec.adapter, seed=0, device=world.device)
    if spec.model.dtype == "bf16":
        # As a run does, which has autocast beside.
        fuse(model)
    parameters = trainable(model)
    strategy.shard(base.model, parameters)
    fill_base(
        base,
        spec,
        device=world.device,
        share=strategy.share,
        gather=strategy.holders.gather_rows,
        put=strategy.put,
    )
    trained = strategy.train(parameters)
    seen = Comparison(reference(folder, spec, world.device), args.damage)
    layers = {}
    for slot in base.slots:
        if slot.is_nf4:
            layers[slot.module] = slot.names[0]
    assert len(layers) == 7 * LAYERS

    def compare_all():
        for layer in base.model.get_decoder().layers:
            with gathered(layer, zero=zero):
                for module in layer.modules():
                    if isinstance(module, Nf4Linear):
                        seen.look(layers[module], module.weight)

    def look(adapted):
        layer = adapted.get_base_layer()
        seen.look(layers[layer], layer.weight)

    def before(module, _inputs):
        look(module)

    def in_backward(module, _inputs, output):
        if output.requires_grad:
            output.register_hook(lambda _: look(module))

    compare_all()
    model = trained.begin(model, make_optimizer(spec.optimizer, trained.stepped))
    # A layer's product with its adapter is one: the matrix is used where PEFT's layer is called.
    # DeepSpeed's own hooks fetch it before these look, both ways.
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(in_backward, prepend=True)
    model.train()
    losses, received = [], Received()
    for step in range(NUM_STEPS):
        trained.zero()
        generator = torch.Generator().manual_seed(step * world.size + world.rank)
        tokens = torch.randint(VOCABULARY, (2, 32), generator=generator).to(world.device)
        loss = model(input_ids=tokens, labels=tokens).loss / world.size
        trained.backward(loss, last=True)
        trained.step(spec.optimizer.lr, math.inf)
        losses.append(sum(row[0] for row in world.gather([loss.item()])))
    facts = {"losses": [loss.hex() for loss in losses]}
    if not zero:
        facts |= {"received": received.bytes, "planned": planned(spec, base, world, NUM_STEPS)}
    compare_all()
    rows = world.gather([seen.compared, seen.different, seen.matrices])
    compared, different, matrices = (int(sum(column)) for column in zip(*rows, strict=True))
    if world.rank == 0:
        counts = {"compared": compared, "different": different, "matrices": matrices}
        print(json.dumps(counts | facts))
    world.stop()
    return 0


if __name__ == "__main__":
    leave(main())
