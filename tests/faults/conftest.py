"""Faults are injected by POSIX's means: processes that fork and are killed, and limits on a file's size."""

from __future__ import annotations

import sys

collect_ignore_glob = ["test_*.py"] if sys.platform == "win32" else []
