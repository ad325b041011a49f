# SPDX-License-Identifier: Apache-2.0
"""Training steps measured side by side: zfunc's and those of its peers."""

from .contenders import CONTENDERS as CONTENDERS
from .contenders import Choice as Choice
from .contenders import Contender as Contender
from .contenders import choose as choose
from .errors import BenchError as BenchError
from .errors import LossesDifferError as LossesDifferError
from .plot import plot_result as plot_result
from .presets import PRESETS as PRESETS
from .presets import Preset as Preset
from .presets import check_installed as check_installed
from .presets import preset as preset
from .report import as_json as as_json
from .report import print_result as print_result
from .report import write_csv as write_csv
from .report import write_json as write_json
from .result import LossDifference as LossDifference
from .result import Measured as Measured
from .result import Ratio as Ratio
from .result import Result as Result
from .result import loss_difference as loss_difference
from .result import ratios as ratios
from .runner import Plan as Plan
from .runner import run as run
