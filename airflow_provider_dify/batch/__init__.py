# SPDX-License-Identifier: Apache-2.0
"""Many workflow runs in one task: rows in, runs, results out."""
