"""Byte-level BPE with Hugging Face `tokenizers`: training, loading, and what each token holds in source bytes.

Words are cut before merging as DeepSeek-V3's tokenizer does (pre-tokenizer of its tokenizer.json: digits in threes,
CJK runs, then punctuation and letters); its "128K" vocabulary is described in arXiv 2412.19437 section 4.1. Nothing is
normalised and no space is added, so decoding gives back every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from perilune.pretrain.data import sources as data_sources
from perilune.pretrain.errors import InputError, make_folder

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
FIM_NAMES = (  # of prefix, suffix and middle, in the order of PSM: ours and Qwen's, DeepSeek's, StarCoder's
    (FIM[0], FIM[2], FIM[1]),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
MEDIA = ("<|media_start|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>")  # Kimi-VL's, by its names
SPECIAL = (BOS, EOS, PAD, *FIM, *MEDIA)  # ids 0, 1, 2, ... in this order

WORDS = (  # each applied to what the one before left, as in DeepSeek-V3's tokenizer.json
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
RECIPE = "training.json"  # beside the tokenizer: from what it was trained
NOT_BLANK = re.compile(r"[ \t]*[!-~\w]")  # the beginning of a line that holds more than white space
LONG_TEXT = 1 << 20  # characters above which a text is encoded in parts, so that memory stays bounded


def train_tokenizer(sources: Sequence[str], out: Path, vocab_size: int) -> Path:
    """Train on the training split of `sources` and write the folder `out`, which transformers loads; returns `out`.

    The same sources and size give the same bytes. Raises InputError for a vocabulary too small for the 256 bytes and
    the special tokens or larger than the text can fill, for bad sources, and for an `out` that holds something else.
    The same recipe again leaves `out` as it is.
    """
    out = Path(out)
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise InputError(f"--vocab-size {vocab_size}: 256 bytes and {len(SPECIAL)} special tokens need {least} or more")
    files = [file for file in data_sources.find_files(sources) if file.split != "valid"]
    recipe = {"vocab_size": vocab_size, "words": list(WORDS), "special_tokens": list(SPECIAL)}
    recipe["files"] = [data_sources.describe(file) for file in files]
    if out.exists() and any(out.iterdir()):
        if _recipe_of(out) == recipe:
            return out
        raise InputError(f"{out} is not empty and was not made from the same text and size; name another --out")
    make_folder(out.parent)  # before the minutes that training takes

    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORDS]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    if tokens := [file.name for file in files if file.ending_of.endswith(".idx")]:
        raise InputError(f"{tokens[0]}: holds tokens, not text; a tokenizer is trained on text")
    texts = (document.text for document in data_sources.read_files(files, "train"))
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise InputError(f"--vocab-size {vocab_size}: this text fills only {reached}; ask for that, or give more text")
    _write(tokenizer, out, recipe)
    return out


def _recipe_of(folder: Path) -> Any:
    """What the tokenizer in `folder` was made from; None where nothing there says so."""
    try:
        return json.loads((folder / RECIPE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _write(tokenizer: tokenizers.Tokenizer, out: Path, recipe: dict[str, Any]) -> None:
    """Write the folder under another name, then rename, so that `out` is whole or not there."""
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    extra = [*FIM, *MEDIA]
    config = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": extra,
        "clean_up_tokenization_spaces": False,  # the clean-up is not undone by decoding
        "add_prefix_space": False,
        "model_max_length": 1 << 30,
    }
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=1),
        "special_tokens_map.json": json.dumps({**names, "additional_special_tokens": extra}, indent=1),
        RECIPE: json.dumps(recipe, indent=1),
    }
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for name, text in contents.items():
            (scratch / name).write_text(text + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        os.replace(scratch, out)
    except BaseException:
        shutil.rmtree(scratch)
        raise


class Tokenizer:
    """A byte-level tokenizer for packing: text to ids and back, exactly, and the bytes each id stands for."""

    def __init__(self, path: Path, inner: tokenizers.Tokenizer, eos_id: int, special: dict[str, int | None]) -> None:
        self.path = path
        self.eos_id = eos_id
        self.inner = inner
        inner.encode_special_tokens = True  # `<|eos|>` written in a document is text, and never ends it
        inner.no_padding()
        inner.no_truncation()
        self.bos_id, self.pad_id = special["bos_token"], special["pad_token"]
        self.media_pad_id: int | None = inner.token_to_id(MEDIA[3])  # the placeholder of images
        canonical = json.dumps(json.loads(inner.to_str()), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        added = inner.get_added_tokens_decoder()
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.uint16)  # [vocab_size]; 0: stands for no text
        for token, i in vocab.items():
            if i in added:
                self.token_bytes[i] = 0 if added[i].special else len(added[i].content.encode())
            else:
                self.token_bytes[i] = len(token)  # byte-level: one character a byte

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64 [tokens], without special tokens.

        Raises InputError where the ids do not stand for exactly the text's bytes (a tokenizer that alters text).
        """
        parts = [list(_parts(text)) for text in texts]
        encoded = iter(self.inner.encode_batch_fast([p for ps in parts for p in ps], add_special_tokens=False))
        rows = []
        normalizer = self.inner.normalizer
        for text, ps in zip(texts, parts, strict=True):
            if normalizer is not None and any(normalizer.normalize_str(p) != p for p in ps):  # the size may stay
                raise InputError(
                    f"{self.path}: its normalizer changes the text {text[:40]!r}...; normalize the text before, or use "
                    "a tokenizer of `perilune tokenizer train`, which takes it as it is"
                )
            ids = np.concatenate([np.array(next(encoded).ids, dtype=np.int64) for _ in ps] or [np.zeros(0, np.int64)])
            held, size = int(self.token_bytes[ids].sum(dtype=np.int64)), len(text.encode())
            if held != size:
                raise InputError(
                    f"{self.path}: {size} bytes of text became tokens of {held} bytes ({text[:40]!r}...); "
                    "this tokenizer alters text. Use one of `perilune tokenizer train`"
                )
            rows.append(ids)
        return rows

    def fim_ids(self) -> tuple[int, int, int]:
        """Ids of the marks before prefix, suffix and middle; InputError where the vocabulary has none."""
        for names in FIM_NAMES:
            prefix, suffix, middle = (self.inner.token_to_id(name) for name in names)
            if prefix is not None and suffix is not None and middle is not None:
                return prefix, suffix, middle
        raise InputError(
            f"{self.path}: fill-in-the-middle needs the tokens {', '.join(FIM_NAMES[0])} (or "
            f"{', '.join(FIM_NAMES[1])}), which this vocabulary lacks; use --fim-rate 0, "
            "or a tokenizer of `perilune tokenizer train`"
        )

    def media_ids(self) -> tuple[int, int, int, int]:
        """Ids of MEDIA (start, content, end, placeholder); InputError where the vocabulary lacks one."""
        begin, content, end, pad = (self.inner.token_to_id(name) for name in MEDIA)
        if begin is None or content is None or end is None or pad is None:
            raise InputError(
                f"{self.path}: images need the tokens {', '.join(MEDIA)}, which this vocabulary lacks; "
                "use a tokenizer of `perilune tokenizer train`, or leave the images out"
            )
        return begin, content, end, pad

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens spelled out; a character cut in two shows as U+FFFD."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer folder: of `train_tokenizer`, or any byte-level one in transformers' layout with an EOS.

    Raises InputError where files are missing or damaged, the tokenizer is not byte-level, or it names no EOS.
    """
    path = Path(path)
    try:
        inner = tokenizers.Tokenizer.from_str((path / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: missing; make a tokenizer with `perilune tokenizer train`") from error
    except Exception as error:  # `tokenizers` raises bare Exception for a damaged file
        raise InputError(f"{path}: not a tokenizer that can be loaded: {error}") from error
    if '"type":"ByteLevel"' not in inner.to_str():
        raise InputError(f"{path}: not a byte-level tokenizer; make one with `perilune tokenizer train`")
    special: dict[str, int | None] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        special[name] = inner.token_to_id(token) if token else None
    eos_id = special["eos_token"]
    if eos_id is None:
        raise InputError(f"{path}: its configuration names no eos_token of the vocabulary; documents end with it")
    return Tokenizer(path, inner, eos_id, special)


def _parts(text: str) -> Iterator[str]:
    """`text` in parts of about LONG_TEXT characters, cut before a line that is not blank.

    WORDS never joins such a line to the newline before it, so the ids are those of the whole text. A text without such
    a line for that long is cut where it stands: its ids may differ at the cut, its bytes do not.
    """
    start = 0
    while len(text) - start > LONG_TEXT:
        cut = text.rfind("\n", start, start + LONG_TEXT) + 1
        while cut > start and not NOT_BLANK.match(text, cut):
            cut = text.rfind("\n", start, cut - 1) + 1
        cut = cut if cut > start else start + LONG_TEXT
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
