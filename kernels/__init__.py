# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, imported as `zfunc.kernels`.

Import rule: a module in here imports torch, Triton and (relatively) its neighbours, and
nothing else of zfunc, so a kernel can be read, tested and reused on its own.
"""
