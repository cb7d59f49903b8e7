"""What is known of a model before its tensors are read: its sizes, how it reads text, whether it sees.

Nothing of torch: what a model cannot be asked is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from perilune.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from perilune.pretrain.errors import InputError
from perilune.pretrain.hf import card
from perilune.pretrain.hf.config import config_from_hf
from perilune.pretrain.hf.config_vision import Media, patch_limit_of, without_vision
from perilune.pretrain.hf.folder import read_json
from perilune.pretrain.hf.source import Checkpoint, checkpoint_of, neither
from perilune.pretrain.schema import Config, Model, Vision
from perilune.vision.image_header import ImageRule


@dataclass(frozen=True)
class Text:
    """How the model reads and ends text."""

    tokenizer: Tokenizer
    prefix: tuple[int, ...]  # what stands before every text: a BOS where the tokenizer's configuration asks for one
    eos_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model that is not loaded yet."""

    model: Model  # without MTP
    path: Path  # of the checkpoint or folder
    step: int | None  # None: a Hugging Face folder
    run_dir: Path | None  # of a checkpoint in a run
    config: Config | None  # of a checkpoint
    checkpoint: Checkpoint | None = None  # None: a Hugging Face folder
    text: Text | None
    no_text: str = ""  # why `text` is None
    vision: Vision | None = None  # None: a language model alone
    patch_limit: int = ImageRule.patch_limit  # above which images are scaled down

    def need_text(self) -> Text:
        """Raises InputError where there is no tokenizer."""
        if self.text is None:
            raise InputError(f"{self.path} comes without a tokenizer ({self.no_text}); name its folder by --tokenizer")
        return self.text

    def ends(self) -> frozenset[int]:
        """Tokens that end what the model says: those of its text and, where it sees, the one that begins an image.

        Raises InputError where there is no tokenizer.
        """
        text = self.need_text()
        if self.vision is None or text.tokenizer.media_pad_id is None:
            return text.eos_ids
        return text.eos_ids | {text.tokenizer.media_ids()[0]}

    def need_tower(self) -> ImageRule:
        """How images become patches and placeholders. Raises InputError for a model without a tower, and where the
        tokenizer lacks the tokens of images.
        """
        if self.vision is None:
            raise InputError(f"{self.path} is of a language model alone, without a vision tower: it sees no image")
        placeholder = self.need_text().tokenizer.media_ids()[3]
        return ImageRule(placeholder, self.vision.patch_size, self.vision.merge_size, self.patch_limit)


def describe(path: Path, tokenizer: Path | None = None, *, average: bool = False) -> Described:
    """The model at `path`: a run, a checkpoint or a Hugging Face folder.

    `tokenizer` takes the place of the one that the run's data or the folder names, with `average` it is the average of
    the weights (`optim.ema_decay`). Raises InputError for a path, a config or a tokenizer that does not fit, and where
    there is no average.
    """
    if (path / "config.json").is_file():
        if average:
            raise InputError(f"--ema: {path} is a Hugging Face folder, which holds one set of weights; name the run")
        return _describe_hf(path, tokenizer)
    if checkpoint_of(path) is None:
        raise InputError(neither(path, "a Hugging Face folder (config.json)"))
    checkpoint = Checkpoint(path, average=average)
    model, vision = replace(checkpoint.config.model, num_nextn_predict_layers=0), checkpoint.config.vision
    own = card.tokenizer_of(checkpoint) if tokenizer is None else card.TokenizerFiles()
    where = tokenizer or (own.files[0].parent if own.files else None)
    return Described(
        model=model,
        path=checkpoint.path,
        step=checkpoint.manifest["step"],
        run_dir=checkpoint.run_dir,
        config=checkpoint.config,
        checkpoint=checkpoint,
        text=_text(where, model) if where else None,
        no_text=own.missing,
        vision=vision if vision.num_layers else None,
        patch_limit=card.patch_limit(checkpoint),
    )


def _describe_hf(path: Path, tokenizer: Path | None) -> Described:
    raw = read_json(path / "config.json")
    decoder, vision, _, media = without_vision(raw) or (raw, Vision(), "deepseek_v3", None)
    model = replace(config_from_hf(decoder), num_nextn_predict_layers=0)
    where = tokenizer or path
    here = (where / "tokenizer.json").is_file() or tokenizer is not None
    text = _text(where, model) if here else None
    if text is not None and media is not None:
        _same_placeholder(text.tokenizer, media, path)
    generation = path / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.is_file() else raw.get("eos_token_id")
    if text is not None and ends is not None:
        text = replace(text, eos_ids=_ids(ends, path))
    processor = path / "preprocessor_config.json"
    return Described(
        model=model,
        path=path,
        step=None,
        run_dir=None,
        config=None,
        text=text,
        no_text="" if here else "it holds no tokenizer.json",
        vision=vision if vision.num_layers else None,
        patch_limit=patch_limit_of(read_json(processor)) if processor.is_file() else ImageRule.patch_limit,
    )


def _same_placeholder(tokenizer: Tokenizer, media: Media, path: Path) -> None:
    if tokenizer.media_pad_id != media.pad:
        raise InputError(
            f"{path}: config.json says that token {media.pad} stands for images, the tokenizer {tokenizer.path} that "
            f"{tokenizer.media_pad_id} does; name the model's own by --tokenizer"
        )


def _ids(said: object, path: Path) -> frozenset[int]:
    ids = said if isinstance(said, list) else [said]
    if not ids or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise InputError(f"{path}: eos_token_id is {said!r}; a token id or a list of them is expected")
    return frozenset(ids)


def _text(path: Path, model: Model) -> Text:
    config = read_json(path / "tokenizer_config.json")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(f"{path}: this tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}")
    prefix = list(tokenizer.inner.encode("", add_special_tokens=True).ids)
    if not prefix and config.get("add_bos_token") and tokenizer.bos_id is not None:
        prefix = [tokenizer.bos_id]
    return Text(tokenizer, tuple(prefix), frozenset({tokenizer.eos_id}))
