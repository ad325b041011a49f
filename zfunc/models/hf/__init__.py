# SPDX-License-Identifier: Apache-2.0
"""Models of transformers as functions of their parameters."""
