"""The command line under ``torchrun`` on a machine without a GPU, as if each process had one."""

from __future__ import annotations

import sys
from unittest import mock

from instantcharacter.cli.main import main

if __name__ == "__main__":
    with mock.patch("torch.accelerator.device_count", lambda: 1):
        sys.exit(main())
