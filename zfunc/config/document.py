# SPDX-License-Identifier: Apache-2.0
"""The page of all keys, from the table that checks them.

``python -m zfunc.config.document > docs/ds_config.md`` makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Final

from zfunc.config.errors import shown
from zfunc.config.keys import MEANINGLESS, PLANNED, REFUSED, SUPPORTED, Key
from zfunc.config.keys_zero import ZERO
from zfunc.config.kinds import ANYTHING
from zfunc.config.optimizers import OPTIMIZERS, REFUSED_NAMES
from zfunc.config.schedules import REQUIRED, SCHEDULERS
from zfunc.config.table import ALIASES, KEYS

_VERSION: Final = "0.19.8"
_HEAD: Final = """\
# Keys of a DeepSpeed configuration

This page is generated from the table that checks a configuration
(`python -m zfunc.config.document > docs/ds_config.md`); a test compares them. Defaults
are those of the code of DeepSpeed {version}.

```python
import zfunc as zf

config = {{
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {{"type": "AdamW", "params": {{"lr": 3e-4}}}},
    "zero_optimization": {{"stage": 2}},
}}
tx, transforms, jit, data = zf.from_ds_config(config, world=2)
print(data.accumulation_steps)
```

```text
2
```

`zfunc config check ds_config.json` says everything that is wrong, with exit code 2, and
`zfunc config explain ds_config.json` what each key became. What the four words mean:

| word | rows below | |
|---|---|---|
| supported | {supported} | does what it does in DeepSpeed |
| not meaningful here | {meaningless} | of DeepSpeed's machinery, without an effect on \
numbers: accepted, and named by `zfunc config explain` |
| planned | {planned} | a feature that is not here yet: accepted where it is off, an \
error where it is on |
| refused | {refused} | a feature that will not be here in this form: the same |

A key that does not exist is an error too, at the top as well. `"auto"` is DeepSpeed's
default, or what `auto={{...}}` (on the command line `--auto PATH=VALUE`) says; batch
sizes and the steps of a schedule have no default. The file may have comments; a key
that is there twice is an error. Of a section that is not here, `"enabled": false` is
read and nothing else.
"""
_ORDER: Final = (
    ("Training", ("", "optimizer")),
    ("Precision", ("fp16", "bf16", "torch_autocast", "data_types")),
    ("ZeRO", ("zero_optimization",)),
)


def page() -> str:
    """The whole page, in Markdown.

    Examples:
      >>> page().splitlines()[0]
      '# Keys of a DeepSpeed configuration'
    """
    keys = [*KEYS.values()]
    params = [key for each in OPTIMIZERS.values() for key in each.keys]
    params += [key for each in SCHEDULERS.values() for key in each]
    counts = Counter(key.status for key in [*keys, *params])
    head = _HEAD.format(
        version=_VERSION,
        supported=counts[SUPPORTED],
        meaningless=counts[MEANINGLESS],
        planned=counts[PLANNED],
        refused=counts[REFUSED],
    )
    return "\n".join([head, *_parts(keys), *_types(), *_names()])


def _parts(keys: list[Key]) -> Iterator[str]:
    shown_already: set[str] = set()
    for title, sections in _ORDER:
        chosen = [key for key in keys if _section(key.path) in sections]
        shown_already |= {key.path for key in chosen}
        yield f"## {title}\n\n{_table(chosen, '')}"
    rest = [key for key in keys if key.path not in shown_already]
    yield f"## Other sections\n\n{_table(rest, '')}"


def _types() -> Iterator[str]:
    for title, prefix, table in (
        ("Optimizers", "optimizer.params.", {n: o.keys for n, o in OPTIMIZERS.items()}),
        ("Schedulers", "scheduler.params.", dict(SCHEDULERS)),
    ):
        yield f"## {title}\n"
        for name, keys in table.items():
            yield f"### {name}\n\n{_table(keys, prefix)}"
        if title == "Optimizers":
            yield _refused()


def _refused() -> str:
    rows = "\n".join(
        f"| `{name}` | {reason} | `{other}` |"
        for name, (reason, other) in REFUSED_NAMES.items()
    )
    head = "| name | why | type |\n|---|---|---|"
    return f"### Optimizers that are refused\n\n{head}\n{rows}\n"


def _names() -> Iterator[str]:
    rows = "\n".join(
        f"| `{old}` | `{new}` | {why} |" for old, (new, why) in sorted(ALIASES.items())
    )
    yield f"## Other names\n\n| name | is | |\n|---|---|---|\n{rows}\n"
    yield (
        f"`{ZERO.rstrip('.')}: true` is stage 1 and `false` is stage 0 (deprecated).\n"
    )


def _section(path: str) -> str:
    return path.partition(".")[0] if "." in path else _OWN.get(path, "")


_OWN: Final = MappingProxyType(
    {
        path: "torch_autocast" if path == "amp" else "other"
        for path, key in KEYS.items()
        if "." not in path and key.kind is ANYTHING
    }
)


def _table(keys: Iterable[Key], prefix: str) -> str:
    lines = ["| key | default | here | |", "|---|---|---|---|"]
    for key in keys:
        default = REQUIRED if key.default == REQUIRED else f"`{shown(key.default)}`"
        lines.append(
            f"| `{key.path.removeprefix(prefix)}` | {default} | {key.status} | "
            f"{key.note} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(page(), end="")
