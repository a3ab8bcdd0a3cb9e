"""Whether this process's GPU can do its part, asked before anything long begins."""

import torch

from qlora_dist.errors import BadNodeError
from qlora_dist.plan import Plan
from qlora_dist.sizes import GIB

# Ones times ones: each element of the product is exact in any dtype.
_SIDE = 256


def check_gpu(plan: Plan, device: torch.device) -> None:
    """Look at a GPU's free memory, and have it multiply; nothing on a CPU.

    Raises:
        BadNodeError: Somebody else holds the memory that the plan needs, or a product is wrong.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    needed = plan.memory.needed_bytes
    # A GPU that is too small for the plan is the plan's affair.
    if free < needed <= total:
        raise BadNodeError(
            f"{device}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free and the run needs "
            f"{needed / GIB:.1f}: another process holds the rest (nvidia-smi shows it)"
        )
    ones = torch.ones(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
    if not bool((ones @ ones == _SIDE).all()):
        raise BadNodeError(f"{device} multiplies wrongly")
