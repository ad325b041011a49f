# SPDX-License-Identifier: Apache-2.0
"""The table, and the page that is made from it."""

from pathlib import Path

import pytest

from zfunc.config.document import page
from zfunc.config.keys import PLANNED, REFUSED
from zfunc.config.optimizers import OPTIMIZERS
from zfunc.config.schedules import REQUIRED, SCHEDULERS
from zfunc.config.table import ALIASES, KEYS, SECTIONS

ROOT = Path(__file__).resolve().parents[3]
ALL = [
    *KEYS.values(),
    *(key for each in OPTIMIZERS.values() for key in each.keys),
    *(key for keys in SCHEDULERS.values() for key in keys),
]


def test_the_page_is_up_to_date():
    stored = (ROOT / "docs/ds_config.md").read_text("utf-8")
    assert stored == page(), (
        "make it again: python -m zfunc.config.document > docs/ds_config.md"
    )


def test_every_key_is_on_the_page_once():
    text = page()
    for path in KEYS:
        assert text.count(f"\n| `{path}` |") == 1, path


@pytest.mark.parametrize("key", ALL, ids=lambda key: key.path)
def test_a_row_of_the_table_is_whole(key):
    assert key.note
    assert "\n" not in key.note
    assert key.path not in SECTIONS
    if key.gate:
        assert KEYS[key.gate].status in (PLANNED, REFUSED)
    if key.kind.example is not None:
        key.kind.check(key.kind.example)
    named = key.path.endswith(("leaf_module.classes", "keep_in_fp32_modules"))
    if key.default not in (None, REQUIRED, "auto") and not named:
        key.kind.check(key.default)
        assert key.is_off(key.default) or key.status not in (PLANNED, REFUSED)


def test_aliases_lead_to_keys():
    for old, (new, _) in ALIASES.items():
        assert old not in KEYS
        assert new in KEYS or new in SECTIONS
