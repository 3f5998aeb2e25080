"""Seeds as pure functions of integers: stable over Python, numpy and torch versions (never `hash()`, which is salted)."""

import numpy as np

_MASK = (1 << 64) - 1


def mix64(*values: int) -> int:
    """64-bit hash of a sequence of integers (splitmix64's finaliser, chained). Equal on every machine, for ever."""
    state = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: splitmix64's step
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        # shifts and factors: Stafford's variant 13 of MurmurHash3's finaliser, as splitmix64 has it
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def mix64_array(prefix: int, values: np.ndarray) -> np.ndarray:
    """uint64 [n]: one more `mix64` round on top of the state `prefix` (itself a `mix64(...)`) for each of `values` [n].

    `mix64_array(mix64(a, b), values)[i] == mix64(a, b, values[i])`.
    """
    with np.errstate(over="ignore"):  # sums and products are meant modulo 2^64
        state = (np.uint64(prefix) ^ values.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return state ^ state >> np.uint64(31)
