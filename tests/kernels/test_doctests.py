# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of ``zfunc.kernels``.

pytest would import the folder a second time, as ``kernels``, and every operator can be
registered once.
"""

import doctest
import importlib
import pkgutil

import pytest
from _pytest.doctest import _get_checker, _get_flag_lookup

from zfunc import kernels

NAMES = [info.name for info in pkgutil.iter_modules(kernels.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, pytestconfig):
    module = importlib.import_module(f"{kernels.__name__}.{name}")
    flags = sum(
        _get_flag_lookup()[flag] for flag in pytestconfig.getini("doctest_optionflags")
    )
    # NUMBER, which compares the digits that are written, is a checker of pytest's.
    runner = doctest.DocTestRunner(checker=_get_checker(), optionflags=flags)
    for test in doctest.DocTestFinder().find(module, module.__name__):
        runner.run(test)
    assert runner.summarize().failed == 0
