"""The parts that login nodes and compute nodes share: spec, plan, run directory, training.

Nothing here or in ``qlora_dist.data`` imports torch; what needs it lives in ``qlora_dist.train``.
"""

__version__ = "0.1.0"
