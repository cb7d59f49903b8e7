"""`perilune demo --vlm`: a vision-language model through its stages, by the commands that a user would type."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from perilune.pretrain import presets
from perilune.pretrain.demo import start

_DOCUMENTS = 30_000  # of glyphs; the joint stage ends within what is left of their second reading
_TEXT_FIRST = 0.05  # of the joint stage, before its first image; then the part of text falls in three steps


def main(run_dir: Path) -> int:
    """Tokenizer, shards, text run, vision stage, alignment, joint stage; then its questions. Returns the exit code."""
    config = presets.get("demo_vlm")
    home, seq_len = run_dir.resolve(), str(config.data.seq_len)
    glyphs, stdlib = f"demo:glyphs:documents={_DOCUMENTS}", "demo:stdlib"
    tokenizer, images, text = home / "tokenizer", home / "glyphs", home / "stdlib"
    began = time.monotonic()
    size, some = str(config.model.vocab_size), "demo:glyphs:documents=4000"  # enough for the words of all captions
    runs = {stage: home / stage for stage in ("text", "vit", "align", "joint")}
    commands = [["tokenizer", "train", "--out", str(tokenizer), "--vocab-size", size, some, stdlib]]
    for out, source in ((images, glyphs), (text, stdlib)):
        commands.append(["pack", "--out", str(out), "--tokenizer", str(tokenizer), "--seq-len", seq_len, source])
    after = {"text": [], "vit": [], "align": ["vit", "text"], "joint": ["text", "align"]}
    for stage, run in runs.items():
        words = ["train", "demo_vlm", f"stage={stage}", "--run", str(run), "--nproc", "2"]
        words += [f"valid.path={(text if stage == 'text' else images) / 'valid'}"]
        if stage == "joint":
            words.append(f"data.blend={blend(str(text / 'train'), str(images / 'train'))}")
        else:
            words.append(f"data.path={(text if stage == 'text' else images) / 'train'}")
        for before in after[stage]:
            words += ["--after", str(runs[before])]
        commands.append(words)
    commands += [["eval", str(runs["vit"]), "--captions", "0"], ["eval", str(runs["joint"])]]
    commands += [["report", str(runs["vit"])], ["report", str(runs["joint"])]]
    exported = home / "hf"
    if not exported.exists():
        commands.append(["export", str(runs["joint"]), "--out", str(exported), "--format", "kimi_k25", "--verify"])
    for command in commands:
        if code := start(command).wait():
            return code
    _tell(runs["joint"], time.monotonic() - began)
    return 0


def blend(text: str, images: str) -> str:
    """`data.blend` of the joint stage: text alone at first, then less and less (arXiv 2504.07491, section 2.3)."""
    config = presets.get("demo_vlm", "joint")
    tokens = config.train.steps * config.train.global_batch_size * config.data.seq_len
    steps = [(0.0, 1.0), (_TEXT_FIRST, 0.5), (2 * _TEXT_FIRST, 0.25), (3 * _TEXT_FIRST, 0.1)]
    weights = {
        text: {int(part * tokens): share for part, share in steps},
        images: {int(part * tokens): 1 - share for part, share in steps},
    }
    return json.dumps(weights).replace('"0"', "0")


def _tell(run: Path, seconds: float) -> None:
    """What came of it, from the newest evaluation's file."""
    newest = max((path for path in (run / "eval").glob("*.json")), key=lambda path: path.stat().st_mtime)
    found: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8"))["captions"]
    print(
        f"\n{found['captions']:,} letters that no training image shows: {found['exact_match']:.1%} named exactly, "
        f"{found['exact_match_blanked']:.1%} with the image blanked"
    )
    print(f"right and wrong answers with their pictures: {run / 'report.html'}")
    print(f"the whole demo took {seconds / 60:.1f} minutes")
    print(f"see the curves: {Path(sys.prefix) / 'bin' / 'tensorboard'} --logdir {run / 'tensorboard'}")
