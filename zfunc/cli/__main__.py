# SPDX-License-Identifier: Apache-2.0
"""``python -m zfunc.cli``: what torchrun starts on every rank."""

from zfunc.cli.app import main
from zfunc.launch import current_job, leave

if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        if current_job() is None:
            raise
        leave(ended.code)
