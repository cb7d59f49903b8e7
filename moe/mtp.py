"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): Megatron-core's layer, fed by depth.

Megatron-core makes depth k's input by rolling the tokens inside each document, one document after another. Here the
data already holds the tokens of every depth (`PackedBatch.inputs`, [1+D, T]), so that a cut of the row over ranks is
an index along T; going one depth deeper is dropping the first line.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import make_viewless_tensor

from perilune.parallel.recompute import settings


class DepthLayer(MultiTokenPredictionLayer):
    """One prediction depth: [norm(embedding of token i+k); norm(hidden of i)] projected, then a transformer layer.

    With `recompute` it keeps only its inputs for backward, as Megatron-core does where whole layers are recomputed.
    """

    def __init__(self, config: Any, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        if recompute:
            config = copy(config)
            for name, value in settings("full", ()).items():
                setattr(config, name, value)
        super().__init__(config, *args, **kwargs)

    def _get_embeddings(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        embedding: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        packed_seq_params: Any = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """`input_ids` is [depths left + 1, T]; its second line are the tokens of this depth."""
        del packed_seq_params
        deeper = input_ids[1:]
        decoder_input = embedding(input_ids=deeper[:1], position_ids=position_ids)
        hidden_states = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        return deeper, position_ids, padding_mask, decoder_input, hidden_states
