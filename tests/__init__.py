# SPDX-License-Identifier: Apache-2.0
"""A package, so that worker processes import a test module under one name."""
