# SPDX-License-Identifier: Apache-2.0
"""Planning: what a step needs on every rank, from its traced program alone.

``plan`` traces the real step for any number of ranks, with no process group and no
weights in memory, at two small depths, and scales what it finds to the model's depth.
"""

from zfunc.plan.errors import PlanError as PlanError
from zfunc.plan.paper import PaperRow as PaperRow
from zfunc.plan.paper import paper_rows as paper_rows
from zfunc.plan.planner import Stage as Stage
from zfunc.plan.planner import plan as plan
from zfunc.plan.presets import listed as listed
from zfunc.plan.report import as_json as as_json
from zfunc.plan.report import plot as plot
from zfunc.plan.report import print_paper as print_paper
from zfunc.plan.report import print_plan as print_plan
from zfunc.plan.report import print_suggestion as print_suggestion
from zfunc.plan.request import Request as Request
from zfunc.plan.suggest import Suggestion as Suggestion
from zfunc.plan.suggest import suggest as suggest
