"""What Accelerate and DeepSpeed are told, as plain values that follow from a plan.

The launcher writes these to accelerate.yaml and ds_config.json; each process compares the files
with them again, so that what the files say is what runs.
"""

import json
from pathlib import Path
from typing import Any

from qlora_dist.errors import PlanError
from qlora_dist.plan import Plan
from qlora_dist.sizes import PERSISTENT, REDUCE_BUCKET, SHARDED, ZERO, layer_elements
from qlora_dist.spec_file import parse_yaml

_DECODER_LAYER = "LlamaDecoderLayer"


def accelerate_config(plan: Plan) -> dict[str, Any]:
    """Content of accelerate.yaml, in the layout of ``accelerate config`` 1.15."""
    kind, topology = plan.spec.strategy.kind, plan.topology
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": _distributed_type(plan),
        "downcast_bf16": "no",
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "bf16" if plan.spec.model.dtype == "bf16" else "no",
        "num_machines": topology.nodes,
        "num_processes": topology.world_size,
        "rdzv_backend": "static" if topology.nodes == 1 else "c10d",
        "same_network": True,
        "tpu_use_cluster": False,
        "use_cpu": topology.device == "cpu",
    }
    if kind in SHARDED:
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": _DECODER_LAYER,
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": False,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_offload_params": False,
        }
    if kind in ZERO:
        # Relative to the run directory, where accelerate launch is started from.
        config["deepspeed_config"] = {
            "deepspeed_config_file": "ds_config.json",
            "zero3_init_flag": False,
        }
        # Accelerate refuses both: with a DeepSpeed file, the file says it.
        del config["mixed_precision"]
    return config


def _distributed_type(plan: Plan) -> str:
    kind = plan.spec.strategy.kind
    if kind in SHARDED:
        return "FSDP"
    if kind in ZERO:
        return "DEEPSPEED"
    # MULTI_GPU is Accelerate's word for "through torchrun"; MULTI_CPU would want mpirun.
    return "MULTI_GPU" if plan.topology.world_size > 1 else "NO"


def deepspeed_config(plan: Plan) -> dict[str, Any] | None:
    """Content of ds_config.json; None where DeepSpeed has no part in the run."""
    spec, kind = plan.spec, plan.spec.strategy.kind
    if kind not in ZERO:
        return None
    zero: dict[str, Any] = {
        "stage": 2 if kind == "zero2" else 3,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": REDUCE_BUCKET,
    }
    if kind == "zero3":
        # Elements of a decoder layer: the next one comes while this one is at work, and one that is
        # recomputed stays for its backward pass.
        layer = layer_elements(spec, plan.shape)
        zero |= {
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,
            "stage3_max_reuse_distance": layer,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return {
        "train_batch_size": plan.batch.global_size,
        "train_micro_batch_size_per_gpu": plan.batch.micro_size,
        "gradient_accumulation_steps": plan.batch.accumulation,
        "gradient_clipping": spec.optimizer.max_grad_norm or 0.0,
        # Autocast is the loop's: what is trained stays in float32.
        "bf16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2_000_000_000,
        "wall_clock_breakdown": False,
    }


def check_files(folder: Path, plan: Plan) -> None:
    """Compare the files in a run directory with the plan.

    Raises:
        PlanError: A file is missing, or says something else than run.json does.
    """
    differences = _differences(folder / "accelerate.yaml", accelerate_config(plan), "yaml")
    engine = deepspeed_config(plan)
    if engine is not None:
        differences += _differences(folder / "ds_config.json", engine, "json")
    if differences:
        raise PlanError(
            "the launcher's files disagree with run.json:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nPut the old values back, or start a new run with them in its config"
        )


def _differences(path: Path, expected: dict[str, Any], kind: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if kind == "json" else parse_yaml(text, source=str(path))
    except (OSError, ValueError) as error:
        return [f"{path.name}: cannot be read: {error}"]
    if not isinstance(found, dict):
        return [f"{path.name}: is no mapping"]
    there, wanted = _flat(found), _flat(expected)
    return [
        f"{path.name}: {key} is {there.get(key)!r}, run.json wants {wanted.get(key)!r}"
        for key in sorted({*there, *wanted})
        if there.get(key) != wanted.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by the dotted names of their keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
