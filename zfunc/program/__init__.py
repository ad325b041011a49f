# SPDX-License-Identifier: Apache-2.0
"""The step as a program: tracing, passes, analyses and backends."""
