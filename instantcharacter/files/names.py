"""Names of files that every system can have."""

from __future__ import annotations

import re
import reprlib

NAME_BYTES, PATH_BYTES = 255, 1000
"""Limits of a name and of a path, in bytes: with its folder, every system accepts it."""
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)", re.IGNORECASE)
"""Names that Windows has for devices, with any ending."""
UNUSABLE = re.compile(r'[<>:"|?*\x00-\x1f\x7f]|[. ]$')
"""What a name on Windows cannot have in it, or at its end; control characters also change what a log shows."""


def check_path(path: str, name_bytes: int = NAME_BYTES) -> None:
    """Raise ``ValueError`` for a path that is not UTF-8, is too long, or has a name that some system cannot have.

    ComfyUI logs every error in UTF-8. A message that cannot be encoded ends the thread that runs its prompts.

    Args:
        path: with slashes or backslashes.
        name_bytes: limit of each name in it.
    """
    encoded = path.encode("utf-8", "replace")
    names = [name for name in path.replace("\\", "/").split("/") if name not in (".", "..")]
    longest = max((len(name.encode("utf-8", "replace")) for name in names), default=0)
    if "\0" in path or encoded.decode() != path or longest > name_bytes or len(encoded) > PATH_BYTES:
        expected = f"UTF-8, {name_bytes} bytes a name, {PATH_BYTES} in all"
    elif any(RESERVED.match(name) or UNUSABLE.search(name) for name in names):
        expected = 'no name such as CON, none with <>:"|?* or control characters, and none that ends in a dot or space'
    else:
        return
    raise ValueError(f"{reprlib.repr(path)} cannot be a file: expected {expected}")
