# SPDX-License-Identifier: Apache-2.0
"""The manifest: what a checkpoint consists of, as JSON that is checked when read.

A checkpoint is a directory ``step-00000042`` with ``manifest.json`` and one
``rank-00000.safetensors`` per rank that saved it. The manifest is written last, so a
directory without one is not a checkpoint. The header of every data file follows from
the manifest to the byte; nothing that was read from a file decides how it is parsed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from zfunc.checkpoint.damage import DamagedError, OtherSchemaError
from zfunc.checkpoint.files import open_regular
from zfunc.checkpoint.layout import is_stored_by, local_shape, stored_dtype
from zfunc.checkpoint.skeleton import Skeleton

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 2**26
HEADER_ALIGNMENT_BYTES = 8
METRICS_PREFIX = "metrics/"
MAX_METRIC_BYTES = 2**20

Size = Annotated[int, Field(ge=0, lt=2**63)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Axis = tuple[str, Annotated[int, Field(ge=1, lt=2**31)]]


class FileEntry(BaseModel):
    """A data file: what one rank stored.

    Example:
      >>> FileEntry(name="rank-00000.safetensors", size_bytes=8, sha256="0" * 64).name
      'rank-00000.safetensors'
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    size_bytes: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LeafEntry(BaseModel):
    """A leaf of the state. ``spec`` is None for a tensor that is not on the mesh.

    Example:
      >>> LeafEntry(
      ...     path="params/w",
      ...     dtype="float32",
      ...     global_shape=(5,),
      ...     local_shape=(3,),
      ...     spec=("data",),
      ... ).dtype
      'float32'
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    path: str
    dtype: str
    global_shape: tuple[Size, ...]
    local_shape: tuple[Size, ...]
    spec: tuple[str | None, ...] | None

    @property
    def axes_of_dims(self) -> tuple[str | None, ...]:
        """The spec; a tensor that is not placed is the same on every rank."""
        return self.spec or ()

    @field_validator("dtype")
    @classmethod
    def _known(cls, name: str) -> str:
        if stored_dtype(name) is None:
            raise ValueError(f"dtype {name!r} cannot be stored")
        return name


class Manifest(BaseModel):
    """What a checkpoint consists of; ``files`` is by rank and empty until written.

    ``manifest_sha256`` is the hash of all the other fields, so that a flipped digit of
    the cursor, say, does not go unnoticed; empty until written.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    schema_version: Literal[1]
    zfunc_version: str
    step: Size
    key: Int64
    mesh: tuple[Axis, ...]
    cursor: JsonValue
    meta: dict[str, JsonValue]
    aux: Skeleton
    leaves: tuple[LeafEntry, ...]
    files: tuple[FileEntry, ...] = ()
    manifest_sha256: str = ""

    @property
    def num_ranks(self) -> int:
        """Ranks of the mesh that saved it."""
        return math.prod(size for _, size in self.mesh)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if len({name for name, _ in self.mesh}) != len(self.mesh):
            raise ValueError(f"mesh: {self.mesh} names an axis twice")
        paths = {leaf.path for leaf in self.leaves}
        if len(paths) != len(self.leaves):
            raise ValueError("leaves: a path appears twice")
        unknown = [path for path in self.aux.paths() if path not in paths]
        if unknown:
            raise ValueError(f"aux: {unknown[0]!r} is not among the leaves")
        for leaf in self.leaves:
            self._check_leaf(leaf)
        if self.files and len(self.files) != self.num_ranks:
            raise ValueError(f"files: {len(self.files)} for {self.num_ranks} ranks")
        for rank, file in enumerate(self.files):
            if file.name != file_name(rank):
                raise ValueError(
                    f"files: the name of file {rank} is {file.name!r}, expected "
                    f"{file_name(rank)!r}"
                )
        return self

    def _check_leaf(self, leaf: LeafEntry) -> None:
        named = [axis for axis in leaf.axes_of_dims if axis is not None]
        known = {name for name, _ in self.mesh}
        if not known.issuperset(named) or len(set(named)) < len(named):
            raise ValueError(f"leaves: the spec of {leaf.path} is {leaf.spec}")
        if len(leaf.axes_of_dims) > len(leaf.global_shape):
            raise ValueError(
                f"leaves: the spec of {leaf.path} is longer than its shape"
            )
        metric = leaf.path.startswith(METRICS_PREFIX)
        if metric and num_bytes(leaf) > MAX_METRIC_BYTES:
            raise ValueError(f"leaves: {leaf.path} of {num_bytes(leaf)} bytes")
        expected = local_shape(self.mesh, leaf.axes_of_dims, leaf.global_shape)
        if expected != leaf.local_shape:
            raise ValueError(
                f"leaves: the local shape of {leaf.path} is {leaf.local_shape}, its "
                f"global shape {leaf.global_shape} gives {expected}"
            )


def file_name(rank: int) -> str:
    """The data file of a rank.

    Example:
      >>> file_name(3)
      'rank-00003.safetensors'
    """
    return f"rank-{rank:05d}.safetensors"


def step_name(step: int) -> str:
    """The directory of a step.

    Example:
      >>> step_name(42)
      'step-00000042'
    """
    return f"step-{step:08d}"


def zfunc_version() -> str:
    """The version of the installed distribution.

    Example:
      >>> isinstance(zfunc_version(), str)
      True
    """
    try:
        return importlib.metadata.version("zfunc-torch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def stored_leaves(manifest: Manifest, rank: int) -> list[LeafEntry]:
    """The leaves whose pieces are in the file of ``rank``, in the order of their bytes.

    Wide elements come first, so that every tensor is aligned in the file.
    """
    mine = [
        leaf
        for leaf in manifest.leaves
        if is_stored_by(manifest.mesh, leaf.axes_of_dims, rank)
    ]
    return sorted(mine, key=lambda leaf: -_item_bytes(leaf))


def num_bytes(leaf: LeafEntry) -> int:
    """Bytes of every rank's piece of a leaf."""
    return math.prod(leaf.local_shape) * _item_bytes(leaf)


def file_header(manifest: Manifest, rank: int) -> bytes:
    """The first bytes of a rank's file, in the safetensors format, up to the data."""
    step, offset = str(manifest.step), 0
    header: dict[str, object] = {
        "__metadata__": {"format": "pt", "step": step, "rank": str(rank)}
    }
    for leaf in stored_leaves(manifest, rank):
        code, end = (stored_dtype(leaf.dtype) or ("", 0))[0], offset + num_bytes(leaf)
        header[leaf.path] = {
            "dtype": code,
            "shape": leaf.local_shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _item_bytes(leaf: LeafEntry) -> int:
    return (stored_dtype(leaf.dtype) or ("", 0))[1]


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with its own hash in it."""
    own = _hash_of(manifest.model_dump(mode="json"))
    return manifest.model_copy(update={"manifest_sha256": own})


def _hash_of(tree: dict[str, Any]) -> str:
    """Of the JSON, not of the model: a default that is added later changes nothing."""
    rest = {name: value for name, value in tree.items() if name != "manifest_sha256"}
    text = json.dumps(rest, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_sealed(tree: dict[str, Any]) -> bool:
    try:
        return bool(tree.get("manifest_sha256") == _hash_of(tree))
    except RecursionError:  # deeper than what was read: nothing that was written
        return False


def dump_manifest(manifest: Manifest) -> bytes:
    """The text of a manifest; equal manifests give equal bytes."""
    return manifest.model_dump_json(indent=1).encode() + b"\n"


def parse_manifest(text: bytes, where: Path) -> Manifest:
    """The manifest in ``text``, which was read from ``where``.

    Its hash is compared first: what an accident has changed goes no further.

    Raises:
      DamagedError: it is not one, with the first fields that are wrong.
      OtherSchemaError: another version of zfunc wrote it.
    """
    tree = _json(text, where)
    version = tree.get("schema_version")
    if type(version) is not int:
        raise _not_one(where, [f"schema_version: {version!r:.40} is not an integer"])
    if version != SCHEMA_VERSION:
        raise OtherSchemaError(
            f"{where}: schema version {version}, expected {SCHEMA_VERSION}: "
            "another version of zfunc wrote it. Read it with that version."
        )
    if not text.endswith(b"\n"):
        raise DamagedError(f"{where}: its last byte is missing. It is damaged.")
    if not _is_sealed(tree):
        raise DamagedError(
            f"{where}: its manifest_sha256 is not that of its contents. It is damaged: "
            "restore another step (see list_steps)."
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        items = error.errors(include_url=False, include_context=False)
        lines = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg'][:400]}".removeprefix(": ")
            for item in items
        ]
        raise _not_one(where, lines) from None


def _json(text: bytes, where: Path) -> dict[str, Any]:
    """The JSON object in ``text``, each key once."""
    try:
        tree = json.loads(
            text.decode(), object_pairs_hook=_each_once, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise _not_one(where, [f"{error}"[:400]]) from None
    if not isinstance(tree, dict):
        raise _not_one(where, [f"a {type(tree).__name__}, expected an object"])
    return tree


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("an object has a key twice")
    return tree


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _not_one(where: Path, lines: list[str]) -> DamagedError:
    shown = "".join(f"\n  {line}" for line in lines[:8])
    return DamagedError(
        f"{where}: not a manifest ({len(lines)} errors):{shown}\n"
        "It is damaged: restore another step (see list_steps)."
    )


def read_manifest(directory: Path) -> tuple[Manifest, bytes]:
    """The manifest of a step directory, and its text.

    Raises:
      FileNotFoundError, NotADirectoryError: there is none.
      DamagedError: it is damaged.
    """
    where = directory / MANIFEST_NAME
    with open_regular(where) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > MAX_MANIFEST_BYTES:
            raise DamagedError(
                f"{where}: {size_bytes} bytes, a manifest has at most "
                f"{MAX_MANIFEST_BYTES}."
            )
        text = file.read(MAX_MANIFEST_BYTES + 1)
    return parse_manifest(text, where), text
