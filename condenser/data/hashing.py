"""Randomness without state: 64-bit hashes of integers, and random permutations evaluated only where they are needed.

Everything random in the data is a hash of what it depends on (seed, epoch, sample id, position), so that any part of
any epoch can be computed on its own, in any order, by any process. The mixing function is splitmix64's finaliser.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: a bijection of uint64 whose output bits each depend on all input bits."""
    with np.errstate(over="ignore"):
        x = x + GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_ints(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 for each combination of the broadcast integer ``parts``; their order matters."""
    state = np.zeros((), np.uint64)
    for part in parts:
        state = mix(state ^ np.asarray(part).astype(np.uint64))
    return state


def uniform(hashes: np.ndarray) -> np.ndarray:
    """Hashes as numbers in [0, 1): their upper 53 bits."""
    return (hashes >> np.uint64(11)) * 2.0**-53


def permuted(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Where a random permutation of 0..n-1, chosen by ``key``, sends each ``index``, in O(len(index)). It is a Feistel
    network over the next power of four; values past ``n`` are sent again, fewer than four times on average."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    half_bits, low = np.uint64(half), np.uint64((1 << half) - 1)

    def shuffle(x: np.ndarray) -> np.ndarray:
        left, right = x >> half_bits, x & low
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        return left << half_bits | right

    round_keys = [hash_ints(*key, i) for i in range(6)]
    result = shuffle(np.asarray(index).astype(np.uint64))
    while (outside := result >= n).any():
        result[outside] = shuffle(result[outside])
    return result.astype(np.int64)
