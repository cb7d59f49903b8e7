"""`perilune export --verify`: our model and transformers', both from the tensors that were written, give one answer.

Three checks: every written tensor is the checkpoint's, bit by bit (NaN that was cast to another type is NaN), and none
holds NaN, with which nothing could be compared; transformers finds no tensor missing, unexpected or misshapen (MTP
layers, which it leaves out, accounted for by name); logits agree, in fp32, those of MTP too where it can build them.

T tokens, V vocabulary, D the MTP depth.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perilune.parallel.workers import Workers
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf import ours, verify_images
from perilune.pretrain.hf.export import VerifyError, dtype_of, stream
from perilune.pretrain.hf.folder import read_json
from perilune.pretrain.hf.source import Checkpoint
from perilune.pretrain.hf.weights import WeightFolder, as_torch
from perilune.pretrain.schema import Model

TOLERANCE = 1e-4  # largest |difference| of fp32 logits
_NAMED = 3
_LENGTH = 128  # tokens of each text that is compared
_TEXT = """The point of an orbit around the Moon that lies nearest to it is called the perilune. In 1968 the crew of
Apollo 8 passed it at a height of 110 kilometres, saw the Earth rise, and came home.

def perilune(semi_major_axis: float, eccentricity: float) -> float:
    \"\"\"Distance in kilometres from the centre of the Moon.\"\"\"
    return semi_major_axis * (1.0 - eccentricity)

for e in (0.0, 0.1, 0.25):
    print(f"{e:4.2f} {perilune(1848.0, e):8.1f} km")
"""


@dataclass(frozen=True)
class Difference:
    """The largest |difference| of logits over one text: the main model's, and each MTP depth's."""

    text: str
    tokens: int
    main: float
    mtp: tuple[float, ...] | None  # None: not compared


def check_installed() -> None:
    """Raises InputError where transformers is not: said before an export, which may take hours."""
    if importlib.util.find_spec("transformers") is None:
        raise InputError("--verify needs transformers: pip install 'transformers>=5.23,<6'")


def verify(
    folder: Path, checkpoint: Checkpoint, target: str, *, workers: Workers | None = None,
    say: Callable[[str], None] = print,
) -> str:  # fmt: skip
    """Check the export in `folder`; returns one line for the card. Raises VerifyError.

    Our side runs in a process of its own (of `workers`, if given). Both models are held in fp32, one after the other.
    """
    if hold_nan := same_tensors(folder, checkpoint, target):
        more = f" and {len(hold_nan) - _NAMED} more" if len(hold_nan) > _NAMED else ""
        raise VerifyError(
            f"the checkpoint's own weights hold NaN in {', '.join(hold_nan[:_NAMED])}{more}: its logits cannot be "
            "compared; export an earlier one"
        )
    if checkpoint.config.vision.num_layers:
        return _with_images(folder, checkpoint, workers, say)
    rows = texts(folder, checkpoint.config.model)
    if len(rows) == 1:
        say("no tokenizer in the export: random tokens only are compared, no text")
    mine = our_logits(folder, checkpoint.config.model, list(rows.values()), workers)
    theirs = transformers_logits(folder, checkpoint.config.model, list(rows.values()))
    found = [_difference(name, a, b) for name, a, b in zip(rows, mine, theirs, strict=True)]
    for one in found:
        mtp = "" if one.mtp is None else "".join(f", MTP {k} {d:.1e}" for k, d in enumerate(one.mtp, 1))
        say(f"logits over {one.tokens} tokens of {one.text}: largest difference {one.main:.1e}{mtp}")
    if any(one.mtp is None for one in found):
        say("MTP's logits are not compared: transformers gives every MTP layer experts, and this model has none")
    by_depth = [d for one in found for d in (one.main, *(one.mtp or ()))]
    worst = max(by_depth)
    if not all(d <= TOLERANCE for d in by_depth):  # so that NaN fails, which max() may pass over
        raise VerifyError(f"logits differ from transformers' by up to {worst:.2e}; {TOLERANCE:.0e} is allowed")
    return (
        f"logits equal transformers' within {worst:.1e} (fp32, {' and '.join(rows)}"
        f"{', MTP included' if found[0].mtp else ''}); no tensor missing, unexpected or misshapen"
    )


def _with_images(folder: Path, checkpoint: Checkpoint, workers: Workers | None, say: Callable[[str], None]) -> str:
    """The same of a model with a tower, over a prompt with two images."""
    model, vision = checkpoint.config.model, checkpoint.config.vision
    pad = read_json(folder / "config.json")["media_placeholder_token_id"]
    asked = verify_images.prompt(model, vision, pad)
    arguments = (str(folder), model, vision, checkpoint.names, asked)
    if workers is not None:
        mine = workers.run(1, ours.answer, *arguments)[0]
    else:
        with Workers(1, threads=torch.get_num_threads(), timeout_s=24 * 3600.0) as own:
            mine = own.run(1, ours.answer, *arguments)[0]
    with _quiet():
        theirs = verify_images.transformers_answer(
            folder, vision, asked, lambda info, net: _complain(folder, info, net.config.text_config, model)
        )
    logits = float((mine.logits - theirs.logits).abs().max())
    cells = float((mine.cells - theirs.cells).abs().max() / theirs.cells.abs().max())
    say(f"a prompt of {len(asked.ids)} tokens with two images: largest difference {logits:.1e} of logits, {cells:.1e} "
        "of the tower's features beside the largest")  # fmt: skip
    if not (logits <= TOLERANCE and cells <= verify_images.FEATURES):
        raise VerifyError(
            f"beside transformers' logits differ by {logits:.2e} ({TOLERANCE:.0e} is allowed), the tower's features by "
            f"{cells:.2e} of the largest ({verify_images.FEATURES:.0e})"
        )
    return (
        f"logits of a prompt with two images equal transformers' within {logits:.1e}, features within {cells:.1e} "
        "(fp32); no tensor missing, unexpected or misshapen"
    )


def _complain(folder: Path, info: Any, config: Any, model: Model, extra: tuple[str, ...] = ()) -> None:
    """Raise VerifyError for what transformers found, loading the folder; names that begin with `extra` are known."""
    complaints = {
        "missing": set(info["missing_keys"]),
        "unexpected": {name for name in info["unexpected_keys"] if not name.startswith(extra)},
        "mismatched": {str(one) for one in info["mismatched_keys"]},
        "failed": {str(one) for one in info.get("error_msgs") or ()},
    }
    if found := {kind: sorted(names)[:3] for kind, names in complaints.items() if names}:
        raise VerifyError(f"transformers, loading {folder}: {found}")
    if config.num_hidden_layers != model.num_layers:
        raise VerifyError(f"{folder}: config.json says {config.num_hidden_layers} layers, not {model.num_layers}")


def _difference(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    """Of logits [1+D, T, V] and theirs [1+D, T, V] or, where MTP cannot be compared, [1, T, V]."""
    tokens = ours.shape[1]
    by_depth = [float((ours[k, : tokens - k] - theirs[k, : tokens - k]).abs().max()) for k in range(len(theirs))]
    return Difference(name, tokens, by_depth[0], tuple(by_depth[1:]) if len(theirs) == len(ours) else None)


def same_tensors(folder: Path, checkpoint: Checkpoint, target: str) -> list[str]:
    """Names of the written tensors that hold NaN.

    Raises VerifyError unless `folder` holds the checkpoint's values in type `target`, and no other tensor.
    """
    hold_nan = []
    with WeightFolder(folder) as written:
        left = set(written.entries)
        for block, values in stream(checkpoint, target):
            if block.theirs not in left:
                raise VerifyError(f"{folder}: {block.theirs} was not written")
            left.discard(block.theirs)
            again = block.to_ours(written.read(block.theirs))
            stored = as_torch(values)
            # Rounded by torch: what was written was not.
            mine = stored.to(getattr(torch, dtype_of(block, target)))
            if mine.isnan().any():
                hold_nan.append(block.theirs)
            if again.dtype != mine.dtype or not _same(again, mine, cast=stored.dtype != mine.dtype):
                raise VerifyError(f"{folder}: {block.theirs} is not what {checkpoint.path} holds")
        if left:
            raise VerifyError(f"{folder}: {sorted(left)[:3]} belong to no model")
    return hold_nan


def _same(written: torch.Tensor, mine: torch.Tensor, cast: bool) -> bool:
    """Bit by bit; of NaN that was cast there are as many bits as there are processors and libraries."""
    if cast:
        nan = mine.isnan()
        if not torch.equal(written.isnan(), nan):
            return False
        written, mine = written.masked_fill(nan, 0), mine.masked_fill(nan, 0)
    return torch.equal(_bits(written), _bits(mine))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def texts(folder: Path, model: Model) -> dict[str, list[int]]:
    """What is compared: random tokens and, where the export has a tokenizer, a text; at most `_LENGTH` tokens each."""
    length = min(_LENGTH, model.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    rows = {"random tokens": torch.randint(0, model.vocab_size, (length,), generator=generator).tolist()}
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(_TEXT, add_special_tokens=False).ids
        rows["a text"] = ids[:length]
    return rows


# ---------------------------------------------------------------- the two sides


def our_logits(folder: Path, model: Model, rows: list[list[int]], workers: Workers | None = None) -> list[torch.Tensor]:
    """Logits [1+D, T, V] of each row from the tensors in `folder`, by our model in a process of one."""
    if workers is not None:
        return workers.run(1, ours.logits, str(folder), model, rows)[0]
    with Workers(1, threads=torch.get_num_threads(), timeout_s=24 * 3600.0) as own:
        return own.run(1, ours.logits, str(folder), model, rows)[0]


def transformers_logits(folder: Path, model: Model, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits [1+D, T, V] of each row by transformers, [1, T, V] where it cannot build this model's MTP layers.

    Raises VerifyError if it finds a tensor missing, unexpected or misshapen, MTP layers aside.
    """
    from transformers import DeepseekV3ForCausalLM

    last = model.num_layers + model.num_nextn_predict_layers
    mtp_layers = tuple(f"model.layers.{n}." for n in range(model.num_layers, last))
    with _quiet():
        net, info = DeepseekV3ForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a mismatch is in `info` then, with its name
            experts_implementation="eager",  # the others want sizes that are multiples of 16 bytes
        )
        _complain(folder, info, net.config, model, mtp_layers)
        net.eval()
        mtp = _mtp_model(net, model)
    with torch.no_grad():
        return [_their_forward(net, mtp, model, row) for row in rows]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, and its list of MTP tensors as unexpected: they are accounted for by name."""
    from transformers.utils import logging as reports

    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()


def _mtp_model(net: Any, model: Model) -> Any:
    """transformers' MtpModel with the MTP tensors, or None where there is none to compare.

    transformers 5.23 finds them by a pattern with V3's layer number 61, and gives every MTP layer experts.
    """
    if not model.num_nextn_predict_layers or not model.n_routed_experts:
        return None
    from transformers.modeling_layers import MtpModel

    last = model.num_layers + model.num_nextn_predict_layers
    net._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{n}\." for n in range(model.num_layers, last)]
    return MtpModel.from_pretrained(net).eval()


def _their_forward(net: Any, mtp: Any, model: Model, row: list[int]) -> torch.Tensor:
    ids = torch.tensor([row])
    hidden = net.model(ids, use_cache=False).last_hidden_state
    outs = [net.lm_head(hidden)[0]]
    positions = torch.arange(len(row))[None]
    depths = range(model.num_nextn_predict_layers) if mtp is not None else ()
    for depth in depths:
        ids = torch.cat((ids[:, 1:], ids.new_zeros(1, 1)), dim=1)
        hidden = mtp.forward_layer(depth, hidden, positions, None, input_ids=ids)
        outs.append(mtp.shared_head(hidden)[0])
    return torch.stack(outs).float()
