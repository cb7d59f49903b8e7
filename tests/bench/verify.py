"""`inspect --verify` on one core: bytes and tokens a second of CPU time, from the page cache.

    .venv/bin/python tests/bench/verify.py [--rows 1024] [--rounds 5] [--json FILE]

Rows of 8192 tokens in uint32, documents of lognormal length (median 600). CPU time, since a busy machine stretches the
other; the figure is the median of the rounds. Beside it the least that could be done: the bytes read and `zlib.crc32`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from packed_rows import lognormal_lengths, packed_lengths, random_rows, write_dataset

from perilune.pretrain.data.inspect_verify import verify
from perilune.pretrain.data.manifest import read_manifest
from perilune.pretrain.data.storage import open_store

SEQ_LEN, VOCAB = 8192, 129_280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pieces = packed_lengths(lognormal_lengths(options.rows * SEQ_LEN // 1000), SEQ_LEN)[: options.rows]
    seconds, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = write_dataset(Path(folder) / "data", random_rows(pieces, VOCAB), SEQ_LEN, VOCAB)
        for _ in range(options.rounds):
            began = time.process_time()
            found = verify(read_manifest(path), open_store(path))
            seconds.append(time.process_time() - began)
            assert not found.damage and found.rows == len(pieces)
            began = time.process_time()
            for shard in sorted(path.glob("*.tar")):
                zlib.crc32(shard.read_bytes())
            bare.append(time.process_time() - began)
    middle = statistics.median(seconds)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(seconds, bare, strict=True))
    print(f"{found.bytes / 1e6:.0f} MB in {middle:.3f} s of CPU: {found.bytes / 1e6 / middle:.0f} MB/s, "
          f"{found.rows * SEQ_LEN / 1e6 / middle:.1f} M tokens/s; {ratio:.2f} of zlib.crc32 alone")  # fmt: skip
    if options.json:
        rates = [found.bytes / middle, found.bytes / statistics.median(bare)]
        numbers = {"ours": rates[0], "rival": rates[1], "ratio": ratio}
        options.json.write_text(json.dumps([{"name": "verify_vs_crc32", **numbers, "unit": "bytes a CPU second"}]))


if __name__ == "__main__":
    main()
