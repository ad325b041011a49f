# SPDX-License-Identifier: Apache-2.0
"""``python -m zfunc.cli``: what torchrun starts on every rank."""

from zfunc.cli.app import main

if __name__ == "__main__":
    main()
