"""`perilune demo`: the whole path once, by the commands that a user would type, over Python's standard library."""

from __future__ import annotations

import json
import lzma
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from perilune.pretrain import presets

_PREEMPTED = 75


def main(run_dir: Path) -> int:
    """Tokenizer, shards, training stopped half way and resumed, validation beside xz; returns the exit code."""
    config = presets.get("demo")
    home = run_dir.resolve()
    tokenizer, packed, run = home / "tokenizer", home / "packed", home / "run"
    began = time.monotonic()
    source = "demo:stdlib"
    for command in (
        ["tokenizer", "train", "--out", str(tokenizer), "--vocab-size", str(config.model.vocab_size), source],
        ["pack", "--out", str(packed), "--tokenizer", str(tokenizer), "--seq-len", str(config.data.seq_len), source],
    ):
        if code := start(command).wait():
            return code
    train = ["train", "demo", f"data.path={packed / 'train'}", "--run", str(run), "--nproc", "2"]
    half = config.train.steps // 2
    if _last(run).get("step", 0) < half:
        print(f"\nFirst half: to step {half}, then a SIGTERM, as a cluster's scheduler would send it.")
        code = _stop_at(half, train, run)
        if code not in (0, _PREEMPTED):
            return code
    print("\nSecond half: the same command goes on from the checkpoint.")
    if code := start(train).wait():
        return code
    _compare_with_xz(run, source)
    exported = home / "hf"
    if not exported.exists() and (code := start(["export", str(run), "--out", str(exported), "--verify"]).wait()):
        return code
    _continue_with_transformers(exported)
    if code := start(["report", str(run)]).wait():
        return code
    print(f"the whole demo took {(time.monotonic() - began) / 60:.1f} minutes")
    print(f"see the curves: {Path(sys.prefix) / 'bin' / 'tensorboard'} --logdir {run / 'tensorboard'}")
    return 0


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Show a command of `perilune`'s and start it."""
    print(f"\n$ perilune {' '.join(arguments)}", flush=True)
    return subprocess.Popen([sys.executable, "-m", "perilune.pretrain.cli", *arguments], cwd="/")


def _stop_at(step: int, train: list[str], run: Path) -> int:
    """Start training, and send SIGTERM once `step` steps are recorded."""
    process = start(train)
    try:
        while process.poll() is None and _last(run).get("step", 0) < step:
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    return process.wait()


def _last(run: Path) -> dict[str, Any]:
    """The newest complete line of the run's metrics; {} where there is none."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads(lines[-1]) if lines else {}


def _continue_with_transformers(folder: Path) -> None:
    """A few lines that the exported model writes under transformers, which knows nothing of Perilune."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    prompt = "def test_"
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(inputs["input_ids"], max_new_tokens=48, do_sample=False, repetition_penalty=1.3)
    print(f"\ntransformers {transformers.__version__} goes on from {prompt!r} with the exported model:")
    print("\n".join("  | " + line for line in tokenizer.decode(written[0]).splitlines()))


def _compare_with_xz(run: Path, source: str) -> None:
    """The model's bits per byte on the held-out files beside what `xz -9` makes of the same bytes."""
    from perilune.pretrain.data.sources import held_out_bytes

    text = held_out_bytes(source)
    packed = len(lzma.compress(text, preset=9))
    entry = _last(run)
    print(f"\nheld-out text: {len(text):,} bytes that the model never saw")
    print(f"  xz -9           {8 * packed / len(text):.4f} bits per byte (which reads the text as it goes)")
    print(f"  the model       {entry['valid_bpb']:.4f} bits per byte after {entry['tokens']:,} tokens")
