"""A model that gives nan is told so: no figure is made of it, and no choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from perilune.pretrain.errors import InputError
from perilune.pretrain.evaluate import generate, likelihood, validation


def nan_losses(net: Any, inputs_T: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.full((inputs_T.numel(),), torch.nan)


def test_likelihoods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of choices by nan the first would be the answer."""
    monkeypatch.setattr(likelihood, "packed_losses", nan_losses)
    with pytest.raises(InputError, match=r"likelihoods are not finite .* try an earlier checkpoint"):
        next(likelihood.log_likelihoods(None, [[1, 2, 3]]))  # type: ignore[arg-type]


def test_validation(monkeypatch: pytest.MonkeyPatch, packed: Path) -> None:
    monkeypatch.setattr(validation, "packed_losses", nan_losses)
    with pytest.raises(InputError, match=r"losses on .* are not finite"):
        validation.validate(None, packed, vocab_size=400)  # type: ignore[arg-type]


def test_losses_that_do_not_count_may_be_anything(monkeypatch: pytest.MonkeyPatch, packed: Path) -> None:
    def losses(net: Any, inputs_T: torch.Tensor, labels_T: torch.Tensor, positions_T: torch.Tensor, cu: torch.Tensor,
               images: Any) -> torch.Tensor:  # fmt: skip
        found = torch.ones(inputs_T.numel())
        found[cu[1:].long() - 1] = torch.nan  # the last token of a document predicts nothing
        return found

    monkeypatch.setattr(validation, "packed_losses", losses)
    assert validation.validate(None, packed, vocab_size=400).total.loss == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits(temperature: float) -> None:
    logits_BV = torch.tensor([[0.0, torch.nan, 1.0]])
    with pytest.raises(InputError, match="logits are not finite"):
        generate._pick(logits_BV, temperature, 1.0, [torch.Generator()])
