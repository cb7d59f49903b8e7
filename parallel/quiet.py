"""What `train` keeps from its ranks' logs, for the other processes that import Megatron-core."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Before Megatron-core is imported: that Transformer Engine, apex and a CUDA toolkit are not here is no news.

    PYTHONWARNINGS of the user's rules, here and in the processes that this one starts, as in `launch/local.py`.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # CUDA_HOME, where there is no GPU
    if "PYTHONWARNINGS" not in os.environ:
        os.environ["PYTHONWARNINGS"] = "ignore"
        warnings.simplefilter("ignore")
