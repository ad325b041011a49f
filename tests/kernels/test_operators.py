# SPDX-License-Identifier: Apache-2.0
"""Every operator under ``torch.ops.zfunc``, through torch's own checks of operators.

The public functions are called, and what arrives at each operator is taken down: its
schema (nothing is changed or aliased that it does not name), its fake (shapes, dtypes
and strides) and its dispatch under AOT autograd with dynamic shapes are checked with
those arguments. An operator that no call arrives at fails.
"""

import importlib
import pkgutil
from functools import cache, partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from zfunc import kernels


def modules():
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
    return {
        name: importlib.import_module(f"{kernels.__name__}.{name}") for name in names
    }


MODULES = modules()
X, WIDE = torch.randn(4, 6), torch.randn(2, 5, 6).transpose(0, 1)
LABELS = torch.tensor([0, 5, -100, 3])


def a_list(*dtypes):
    return [torch.rand(shape).to(*dtypes) for shape in ((3, 5), (7,))]


def updates(fn, states, **options):
    """An optimizer's calls: pure and donated, plain and with everything on the way."""
    scalars = {
        "coefficient": torch.tensor(0.5),
        "finite": torch.tensor(True),
        "copy_dtype": torch.bfloat16,
    }
    for donate in (False, True):
        lists = [a_list() for _ in range(2 + states)]
        fn(*lists, learning_rate=0.1, donate=donate, kernel="triton", **options)
        rate = torch.tensor(0.1)
        lists[1] = a_list(torch.bfloat16)
        options_now = scalars | options
        fn(*lists, learning_rate=rate, donate=donate, kernel="triton", **options_now)


def backward(fn, *args, **options):
    """A call, and its backward to every floating argument."""
    args = [
        x.detach().requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in args
    ]
    out = fn(*args, kernel="triton", **options)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    sum(x.float().square().sum() for x in outs).backward()


def rope():
    cos, sin = torch.randn(2, 6, 2)
    for x in (torch.randn(3, 6, 4), torch.randn(2, 6, 3, 7).transpose(1, 2)):
        x.requires_grad_()
        MODULES["rope"].rope(x, cos, sin, kernel="triton").sum().backward()


def dropout():
    fn = MODULES["bias_dropout_residual"].bias_dropout_residual
    for bias in (None, X[0]):
        backward(fn, X, bias, X, torch.arange(4), 0.3)
        backward(partial(fn, key=None, rate=0.0), X, bias, X)


def gates():
    for x in (X, WIDE):
        backward(MODULES["swiglu"].swiglu, x, x)
        for form in ("none", "tanh"):
            backward(MODULES["geglu"].geglu, x, x, approximate=form)
            backward(MODULES["bias_gelu"].bias_gelu, x, X[0], approximate=form)


def norms():
    for x in (X, WIDE):
        for residual in (None, x):
            scale, bias = torch.randn(2, 6)
            fn = partial(MODULES["rms_norm"].rms_norm, residual=residual)
            backward(fn, x, scale)
            fn = partial(MODULES["layer_norm"].layer_norm, residual=residual)
            backward(fn, x, scale, bias)


def softmaxes():
    fn = MODULES["softmax"].softmax
    backward(fn, X)
    backward(fn, WIDE, causal=True, scale=0.5)
    backward(fn, X, mask=X > 0)


def losses():
    module = MODULES["cross_entropy"]
    backward(module.cross_entropy, X, LABELS)
    backward(module.cross_entropy, X, LABELS, softcap=5.0, z_loss=0.1)
    module.cross_entropy_and_gradient(X, LABELS, kernel="triton")
    module.cross_entropy(X, LABELS, kernel="reference")
    linear = MODULES["linear_cross_entropy"].linear_cross_entropy
    backward(linear, X, torch.randn(9, 6), LABELS)
    shards = MODULES["cross_entropy_shards"]
    start = {"vocab_start": 0, "kernel": "triton"}
    shards.cross_entropy_statistics(X, LABELS, **start)
    shards.cross_entropy_shard_gradient(
        torch.ones(4), X, LABELS, torch.ones(4), vocab_size=12, **start
    )


def optimizers():
    ones = {"weight1": 1.0, "weight2": 1.0}
    updates(MODULES["adamw"].adamw, 2, **ones)
    updates(MODULES["lamb"].lamb, 2, **ones)
    updates(MODULES["lion"].lion, 1)
    updates(MODULES["sgd"].sgd, 1, momentum=0.9, nesterov=True)
    for fn in (MODULES["global_norm"].global_norm, MODULES["global_norm"].square_sums):
        fn(a_list(), kernel="triton")


class Recorder(TorchDispatchMode):
    """Takes down the arguments of every operator of ours, as they are before it."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "zfunc":
            kept = tree_map(copied, (args, kwargs or {}))
            self.calls.setdefault(func, []).append(kept)
        return func(*args, **(kwargs or {}))


def copied(x):
    """With its own memory and the same strides."""
    if not isinstance(x, torch.Tensor):
        return x
    if 0 in x.stride():
        return x.detach()  # expanded, so nobody writes to it
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def registered():
    """Every operator of the namespace, as torch knows them."""
    names = torch._C._dispatch_get_all_op_names()
    ours = [name.removeprefix("zfunc::") for name in names if name[:7] == "zfunc::"]
    return [getattr(torch.ops.zfunc, name).default for name in sorted(ours)]


@cache
def arriving(case):
    """What arrives at operators in a case: operator -> arguments of every call."""
    torch.manual_seed(0)
    with Recorder() as recorder:
        case()
    return recorder.calls


def different(calls):
    """Calls that differ in more than the numbers in their tensors."""
    kinds = {}
    for call in calls:
        kinds.setdefault(repr(tree_map(described, call)), call)
    return kinds.values()


def described(x):
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.stride(), x.dtype
    return x


SHAPES_AND_CHANGES = ("test_schema", "test_faketensor")
ALL = (*SHAPES_AND_CHANGES, "test_autograd_registration", "test_aot_dispatch_dynamic")
CASES = (rope, dropout, gates, norms, softmaxes, losses, optimizers)


def utilities(op):
    """What is checked: all of it, but no functionalization of what is donated to.

    torch does not make a functional form of an operator that changes its arguments and
    returns a list. ``zfunc.program`` puts those in the place of the functional ones
    when a graph is finished.
    """
    return SHAPES_AND_CHANGES if op._schema.is_mutable else ALL


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_torchs_checks(case):
    for op, calls in arriving(case).items():
        for args, kwargs in different(calls):
            torch.library.opcheck(op, args, kwargs, test_utils=utilities(op))


def test_no_operator_is_forgotten():
    called = {op for case in CASES for op in arriving(case)}
    missing = [op.name() for op in registered() if op not in called]
    assert not missing, f"no case of {__name__} calls {missing}"
