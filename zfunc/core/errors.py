# SPDX-License-Identifier: Apache-2.0
"""The error classes: each says what, where, got against expected, what to type."""


class ZfuncError(Exception):
    """Base class of every error that zfunc raises on purpose.

    Example:
      >>> issubclass(MeshError, ZfuncError) and issubclass(MeshError, ValueError)
      True
    """


class MeshError(ZfuncError, ValueError):
    """A mesh that cannot be made, or an axis that it does not have.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> try:
      ...     make_mesh({"data": 1}).axis_size("dat")
      ... except MeshError as error:
      ...     print(error)
      axis 'dat' is not an axis of the mesh {'data': 1}; its axes: 'data'
    """


class PlacementError(ZfuncError, ValueError):
    """A leaf that does not live where the program needs it.

    Example:
      >>> from zfunc.core.sharding import P
      >>> try:
      ...     P(("data", "tensor"))
      ... except PlacementError as error:
      ...     print(str(error)[:38])
      P takes one axis name or None per dim:
    """


class StructureError(ZfuncError, ValueError):
    """Two pytrees that should have one structure and do not; it names the paths.

    Example:
      >>> from zfunc.core.tree import check_structure
      >>> try:
      ...     check_structure({"w": 1}, {"v": 1}, "grads", "take them from this model.")
      ... except StructureError as error:
      ...     print(str(error).splitlines()[1])
        missing: w
    """


class LossError(ZfuncError, TypeError):
    """A loss that returns something other than a scalar, an aux pair or a Mean.

    Example:
      >>> import torch
      >>> from zfunc.core.autodiff import value_and_grad
      >>> try:
      ...     value_and_grad(lambda p: 2 * p)(torch.ones(2))
      ... except LossError as error:
      ...     print(str(error)[:46])
      the function must return a floating 0-d tensor
    """


class RematError(ZfuncError, RuntimeError):
    """A block given to ``remat`` that captures a tensor which is being differentiated.

    Example:
      >>> raise RematError("pass it as an argument")
      Traceback (most recent call last):
      zfunc.core.errors.RematError: pass it as an argument
    """


class DonatedBufferError(ZfuncError, RuntimeError):
    """A use of a state whose buffers were given to a donating step.

    Example:
      >>> raise DonatedBufferError("params['w'] was donated")
      Traceback (most recent call last):
      zfunc.core.errors.DonatedBufferError: params['w'] was donated
    """


class TraceError(ZfuncError, RuntimeError):
    """A step that cannot be traced: Python that depends on the values of tensors.

    Example:
      >>> raise TraceError("train.py:12 branches on a tensor")
      Traceback (most recent call last):
      zfunc.core.errors.TraceError: train.py:12 branches on a tensor
    """


class RecoveryError(ZfuncError, RuntimeError):
    """A training that its policy stops: a loss that is not finite, or a jump.

    Example:
      >>> raise RecoveryError("step 7: the loss is nan")
      Traceback (most recent call last):
      zfunc.core.errors.RecoveryError: step 7: the loss is nan
    """


class CheckpointError(ZfuncError, ValueError):
    """A checkpoint that is damaged, incomplete, or of another model.

    Example:
      >>> raise CheckpointError("rank-0.safetensors: sha256 differs")
      Traceback (most recent call last):
      zfunc.core.errors.CheckpointError: rank-0.safetensors: sha256 differs
    """
