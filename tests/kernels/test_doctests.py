# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of ``zfunc.kernels``.

pytest would import the folder a second time, as ``kernels``, and every operator can be
registered once.
"""

import doctest
import importlib
import pkgutil

import pytest

from zfunc import kernels

NAMES = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
OPTIONS = doctest.ELLIPSIS


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    module = importlib.import_module(f"{kernels.__name__}.{name}")
    failed, _ = doctest.testmod(module, optionflags=OPTIONS)
    assert failed == 0
