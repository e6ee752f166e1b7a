# SPDX-License-Identifier: MIT
"""What breaks or runs out under a model that is paged."""
