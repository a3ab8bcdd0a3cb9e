"""The parts that login nodes and compute nodes share: spec, plan, run directory, training.

Nothing here or in the modules directly below imports torch; what needs it lives in
``qlora_dist.train`` and ``qlora_dist.evaluate``.
"""

__version__ = "0.1.0"
