"""The order of training: a keyed bijection of [0, n), computed by index, so that no list is ever shuffled or stored.

A Feistel network over the smallest power of two >= n, walked until it lands below n (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002, section 3). At most every second value is walked over again, whatever n.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8  # even, so that halves of unequal width end where they began


def permute(indices: np.ndarray, n: int, *key: object) -> np.ndarray:
    """Where each of `indices` (any shape, 0 <= index < n < 2^62) stands in the order that `key` names; int64.

    `key` is anything with a plain text form: seed, epoch, name. Raises ValueError for an index out of range.
    """
    values = np.asarray(indices)
    if values.size and (values.min() < 0 or not values.max() < n < 1 << 62):
        raise ValueError(f"indices {values.min()}..{values.max()} out of range: [0, {n}) with n < 2^62 is the rule")
    out = values.astype(np.uint64).reshape(-1)
    bits = max(2, (n - 1).bit_length())
    digest = hashlib.shake_128("/".join(map(str, key)).encode()).digest(8 * ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8")
    walking = np.arange(out.size)
    while walking.size:
        out[walking] = _feistel(out[walking], bits, keys)
        walking = walking[out[walking] >= n]
    return out.astype(np.int64).reshape(values.shape)


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass over [0, 2^bits): the halves, of unequal width where bits is odd, change places every round."""
    low, high = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(low), x & _ones(low)
    widths = (high, low)  # of left, right
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & _ones(widths[0]))
        widths = (widths[1], widths[0])
    return (left << np.uint64(low)) | right


def _ones(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
