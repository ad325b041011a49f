# SPDX-License-Identifier: Apache-2.0
"""A keyed permutation of ``range(n)`` that is computed one value at a time."""

_MASK = 2**64 - 1
_NUM_ROUNDS = 8


def permute(index: int, n: int, seed: int, epoch: int = 0) -> int:
    r"""Where a pseudo-random permutation of ``range(n)`` sends ``index``.

    A Feistel network of 8 rounds on the smallest even number of bits that holds
    n: :math:`(l, r) \mapsto (r, l \oplus h_i(r))` is a bijection whatever
    :math:`h_i` is. Values at or above n are sent through again until they fall
    below it (cycle walking, under four passes on average), which keeps it a
    bijection. O(1) memory and time, so no permutation is ever stored, and a loader
    resumes from integers. The numbers are part of the format: they do not change
    with the platform, the torch version or a release of zfunc.

    Args:
      index: In ``[0, n)``.
      n: Size of the permuted range, at least 1.
      seed: Any integer; taken modulo 2^64.
      epoch: Any integer; taken modulo 2^64. Another epoch is another permutation.

    Returns:
      The image, in ``[0, n)``.

    Raises:
      ValueError: ``index`` is outside ``[0, n)``.

    Examples:
      >>> [permute(i, 10, seed=0) for i in range(10)]
      [7, 2, 5, 9, 4, 3, 6, 8, 1, 0]
      >>> sorted(permute(i, 10, seed=0, epoch=1) for i in range(10)) == list(range(10))
      True

    References:
      Black and Rogaway, `Ciphers with Arbitrary Finite Domains
      <https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf>`_, 2002, sections 3, 5.

    Differs from:
      ``torch.utils.data.DistributedSampler`` draws ``torch.randperm(n)`` on every
      rank for every epoch: O(n) memory, and a resume has to skip through it.
    """
    if not 0 <= index < n:
        raise ValueError(f"permute: got index={index}, expected 0 <= index < n={n}")
    half_bits = ((n - 1).bit_length() + 1) // 2
    key = _mix(_mix(seed) ^ epoch)
    while True:
        index = _feistel(index, half_bits, key)
        if index < n:
            return index


def _feistel(value: int, half_bits: int, key: int) -> int:
    half_mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & half_mask
    for number in range(_NUM_ROUNDS):
        mixed = _mix(key ^ _mix(right << 8 | number)) >> 32
        left, right = right, left ^ (mixed & half_mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """The splitmix64 step: a bijection of 64-bit words in which every bit counts."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
