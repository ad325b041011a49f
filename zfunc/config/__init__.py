# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's configurations: checked, explained, and turned into a training step."""

from .batch import DataOptions as DataOptions
from .checking import Entry as Entry
from .errors import ConfigError as ConfigError
from .errors import Problem as Problem
from .interpret import Configured as Configured
from .interpret import Interpretation as Interpretation
from .interpret import from_ds_config as from_ds_config
from .interpret import interpret as interpret
