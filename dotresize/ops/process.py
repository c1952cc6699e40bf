"""The process in which the package was imported; nothing else is imported for it."""

from __future__ import annotations

import os

# OpenMP's threads are not forked with a process: see ``backends.threads``.
IMPORTED_IN = os.getpid()
