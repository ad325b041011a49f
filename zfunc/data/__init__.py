# SPDX-License-Identifier: Apache-2.0
"""Token datasets, and a loader whose whole state is a cursor of three integers."""

from .datasets import ByteDataset as ByteDataset
from .datasets import TokenDataset as TokenDataset
from .datasets import TokenRange as TokenRange
from .datasets import standard_library_files as standard_library_files
from .datasets import train_validation_split as train_validation_split
from .datasets import unigram_entropy as unigram_entropy
from .loader import Cursor as Cursor
from .loader import Loader as Loader
from .memmap import MemmapTokens as MemmapTokens
from .memmap import write_tokens as write_tokens
from .permutation import permute as permute
