# SPDX-License-Identifier: Apache-2.0
"""Settings every test shares: hypothesis profiles, one thread, Triton's interpreter."""

import os

import torch
from hypothesis import HealthCheck, settings

# Without a GPU Triton's kernels run in its interpreter, which it chooses when it is
# imported. (What has to be compiled is compiled in a process of its own.)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Neither profile looks at the clock: a law must not fail because the machine is busy.
_NO_CLOCK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

# The same examples on every run, so a red build is the change's doing.
settings.register_profile(
    "ci",
    **_NO_CLOCK,
    derandomize=True,
    database=None,
    print_blob=True,
    max_examples=100,
)
# New examples on every run: this one searches, `ci` guards.
settings.register_profile(
    "nightly",
    **_NO_CLOCK,
    derandomize=False,
    print_blob=True,
    max_examples=1000,
)
# --hypothesis-profile is read after this module and wins.
settings.load_profile("ci")


def pytest_sessionstart():
    # Sums depend on the number of threads; bitwise laws need it fixed.
    torch.set_num_threads(1)
