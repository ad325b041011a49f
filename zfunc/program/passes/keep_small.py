# SPDX-License-Identifier: Apache-2.0
"""Keep small: a model whose weights fit in two messages is not gathered twice.

So much is under way ahead of its use in any case (see ``prefetch``): to let go of it
and to send it again would buy no memory. (DeepSpeed never gathers tensors of up to
100,000 elements; here all weights of the loss together decide.)
"""

from __future__ import annotations

from zfunc.program import ir
from zfunc.program.passes.bucket import default_bucket_bytes
from zfunc.program.passes.keep_gathered import twins, with_kept
from zfunc.program.program import Pass, Program


def keep_small(*, small_bytes: int | None = None) -> Pass:
    """Undo all re-gathers of a program if together they are at most this large.

    Belongs after ``regather`` and before ``bucket``.

    Args:
      small_bytes: Of the gathered weights. Default: two buckets, 4 MiB on the CPU and
        128 MiB on a GPU. 0 keeps nothing.
    """
    if small_bytes is not None and (
        isinstance(small_bytes, bool)
        or not isinstance(small_bytes, int)
        or small_bytes < 0
    ):
        raise ValueError(f"keep_small: small_bytes is a count; got {small_bytes!r}")

    def kept(program: Program) -> Program:
        limit = small_bytes
        if limit is None:
            limit = 2 * default_bucket_bytes(program.device_type)
        pairs = twins(program.graph)
        again_bytes = sum(ir.val_bytes(again) for _, again in pairs)
        fits = bool(pairs) and again_bytes <= limit
        return with_kept(program, list(range(len(pairs)))) if fits else program

    kept.__name__ = kept.__qualname__ = "keep_small"
    return kept
