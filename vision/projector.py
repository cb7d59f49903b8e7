"""From the tower's features to the decoder's hidden size (Kimi-VL, arXiv 2504.07491, section 2.1).

M merged cells of 2 x 2 patches, H hidden size of the tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from perilune.vision.moonvit import VisionConfig, backend, transformer_config


class Projector(MegatronModule):
    """LayerNorm of each patch, the four of a cell side by side, Linear, exact GELU, Linear."""

    def __init__(self, config: VisionConfig) -> None:
        mc = transformer_config(config)
        super().__init__(config=mc)
        H, merged = mc.hidden_size, config.vision.merge_size**2 * mc.hidden_size
        group = parallel_state.get_tensor_model_parallel_group()
        column, row = backend().column_parallel_linear(), backend().row_parallel_linear()
        common = {"config": mc, "init_method": mc.init_method, "bias": True, "skip_bias_add": False, "tp_group": group,
                  "is_expert": False}  # fmt: skip
        self.pre_norm = torch.nn.LayerNorm(H, eps=1e-5, dtype=config.dtype)
        self.linear_1 = column(merged, merged, gather_output=False, **common)
        self.linear_2 = row(merged, config.text_hidden, input_is_parallel=True, **common)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of what goes in."""
        return self.pre_norm.weight.dtype

    def forward(self, cells_M4H: torch.Tensor) -> torch.Tensor:
        """[M, 4, H] to [M, hidden size of the decoder]."""
        wide, _ = self.linear_1(self.pre_norm(cells_M4H).flatten(1))
        out: torch.Tensor = self.linear_2(F.gelu(wide))[0]
        return out
