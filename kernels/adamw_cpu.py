# SPDX-License-Identifier: Apache-2.0
"""AdamW on a CPU: one pass in C++, compiled at the first large update.

The compiler is the system's; the library is loaded and its file removed. Contraction
to fused multiply-add is off and no mathematics is relaxed, so the bits are those of
the reference, which computes where there is no compiler.
"""

import ctypes
import functools
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from .multi_tensor import BLOCK
from .update_kernel import groups

logger = logging.getLogger("zfunc.kernels")

WORTH_NUMEL: Final = 1 << 20  # a pass over this many takes a millisecond
_TYPES: Final = (
    (torch.float64, "double"),
    (torch.float32, "float"),
    (torch.float16, "half"),
    (torch.bfloat16, "bf16"),
)
_FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
)
_SOURCE: Final = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
// Both round to nearest even, without branches.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float x) {
    uint32_t u = bits_of(x), even = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    bits = uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : even);
  }
  explicit operator float() const { return float_of(uint32_t(bits) << 16); }
};
struct half {
  uint16_t bits;
  half() = default;
  explicit half(float x) {
    uint32_t u = bits_of(x), size = u & 0x7FFFFFFF;
    uint32_t normal = (size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13;
    uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3F000000;
    uint32_t r = size < 0x38800000 ? small : normal;
    r = size >= 0x47800000 ? 0x7C00 : r;
    r = size > 0x7F800000 ? 0x7E00 : r;
    bits = uint16_t(r | ((u >> 16) & 0x8000));
  }
  explicit operator float() const {
    uint32_t size = bits & 0x7FFF;
    uint32_t u = bits_of(float_of(size << 13) * 0x1p112f);
    u |= size >= 0x7C00 ? 0x7F800000 : 0;
    return float_of(u | uint32_t(bits & 0x8000) << 16);
  }
};
// Through float, as torch narrows float64.
template <typename T> static inline T narrow(double x) { return T(float(x)); }
template <> inline double narrow<double>(double x) { return x; }
constexpr int64_t RUN = 512;
static inline W widen(double x) { return W(x); }
static inline W widen(float x) { return W(x); }
static inline W widen(bf16 x) { return W(float(x)); }
static inline W widen(half x) { return W(float(x)); }

// To memory, past the caches: a copy that nobody reads soon is not fetched first.
static inline void stream(void* to, const void* from, int64_t bytes) {
  int64_t done = 0;
#ifdef __SSE2__
  if ((uintptr_t)to % 16 == 0)
    for (; done + 16 <= bytes; done += 16)
      _mm_stream_si128((__m128i*)((char*)to + done),
                       _mm_load_si128((const __m128i*)((const char*)from + done)));
#endif
  std::memcpy((char*)to + done, (const char*)from + done, bytes - done);
}

// One run of elements; the arrays of a donated update are the same in and out.
static void update(const P* p, const G* g, const W* m, const W* n, P* p_out, W* m_out,
                   W* n_out, C* c_out, int64_t count, const double* s, double lambda,
                   bool coupled) {
  const W rate = -W(s[0]), coefficient = W(s[1]), weight1 = W(s[2]), weight2 = W(s[3]);
  const W keep1 = W(s[4]), new1 = W(s[5]), keep2 = W(s[6]), new2 = W(s[7]);
  const W eps = W(s[8]), before = coupled ? lambda : 0, after = coupled ? 0 : lambda;
  alignas(64) C copies[COPIED ? RUN : 1];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    W old = widen(p[i]), x = widen(g[i]) * coefficient;
    x = before != 0 ? x + before * old : x;
    W mean = keep1 * m[i] + new1 * x;
    W square = keep2 * n[i] + new2 * (x * x);
    W u = (mean / weight1) / (std::sqrt(square / weight2) + eps);
    u = eps == 0 && mean == 0 ? mean : u;
    u = after != 0 ? u + after * old : u;
    P result = narrow<P>(old + rate * u);
    p_out[i] = result;
    m_out[i] = mean;
    n_out[i] = square;
    if (COPIED) copies[i] = narrow<C>(widen(result));
  }
  if (COPIED) stream(c_out, copies, count * sizeof(C));
}

// The rows of the table: first chunks, elements, an address per column, places, decays
// (float64); then the numbers, in float64 too.
extern "C" void adamw(const int64_t* table, int64_t tensors, int64_t chunks,
                      int64_t size, int coupled, int threads) {
  const int64_t columns = COPIED ? 8 : 7;
  double numbers[9];
  std::memcpy(numbers, table + (4 + columns) * tensors, sizeof numbers);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int64_t low = 0, high = tensors;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (table[middle] <= chunk ? low : high) = middle;
    }
    int64_t at = (chunk - table[low]) * size, left = table[tensors + low] - at;
    auto row = [&](int64_t i) { return table[i * tensors + low]; };
    double lambda;
    std::memcpy(&lambda, table + (3 + columns) * tensors + low, sizeof lambda);
    int64_t end = at + (left < size ? left : size);
    for (int64_t step = COPIED ? RUN : end - at; at < end; at += step)
      update((P*)row(2) + at, (G*)row(3) + at, (W*)row(4) + at, (W*)row(5) + at,
             (P*)row(6) + at, (W*)row(7) + at, (W*)row(8) + at,
             COPIED ? (C*)row(9) + at : nullptr, end - at < step ? end - at : step,
             numbers, lambda, coupled);
#ifdef __SSE2__
    if (COPIED) _mm_sfence();
#endif
  }
}
"""


def compiler() -> str | None:
    """The C++ compiler of the system, if there is one."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def library(defines: tuple[str, ...]) -> Any:
    """The compiled function for these macros, or None where it cannot be had.

    Args:
      defines: ``"P=float"``: the types of parameters, gradients, arithmetic and copies.
    """
    if (found := compiler()) is None:
        logger.info("no C++ compiler was found; AdamW on the CPU computes by torch")
        return None
    with tempfile.TemporaryDirectory(prefix="zfunc-") as folder:
        source, made, target = (Path(folder, f"adamw.{x}") for x in ("cpp", "o", "so"))
        source.write_text(_SOURCE)
        macros = [f"-D{x}" for x in defines]
        compiling = [found, *_FLAGS, *macros, "-c", str(source), "-o", str(made)]
        # Without a library of threads of its own: those of torch are there already,
        # and two sets of them wait for each other's cores.
        linking = [found, "-shared", str(made), "-o", str(target)]
        try:
            for command in (compiling, linking):
                subprocess.run(command, check=True, capture_output=True, text=True)
            function = ctypes.CDLL(str(target)).adamw
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            logger.warning("%s did not build AdamW, torch computes it: %s", found, why)
            return None
    number, flag = ctypes.c_int64, ctypes.c_int
    function.argtypes = [ctypes.c_void_p, number, number, number, flag, flag]
    function.restype = None
    return function


def run(
    reads: Sequence[Sequence[Tensor]],
    writes: Sequence[Sequence[Tensor]],
    decay: Sequence[float],
    numbers: Sequence[float],
    coupled: bool,
) -> bool:
    """Update p, g, mu and nu into p, mu, nu and perhaps copies.

    Args:
      reads: Lists of CPU tensors.
      writes: Likewise; the first three may be among those.
      decay: The weight decay of every tensor.
      numbers: Of all: the learning rate, the coefficient, the bias corrections, b1,
        1 - b1, b2, 1 - b2, eps.
      coupled: Whether the decay goes through the moments.

    Returns:
      Whether it could; if not, nothing is written.
    """
    found, types = groups(reads, writes, decay, numbers), dict(_TYPES)
    functions = []
    for group in found:
        dtypes = [types[group.columns[i][0].dtype] for i in (0, 1, 2, -1)]
        macros = [f"{name}={x}" for name, x in zip("PGWC", dtypes, strict=True)]
        functions.append(library((*macros, f"COPIED={len(writes) - 3}")))
    if None in functions:
        return False
    for group, function in zip(found, functions, strict=True):
        data, count, blocks, chunks, *_ = group.table
        threads = torch.get_num_threads()
        function(data.data_ptr(), count, chunks, blocks * BLOCK, coupled, threads)
        group.finish()
    return True
