"""Who may read what was written."""

import os
import stat


def assert_for_all(folder):
    """Every file and folder below has the mode that the umask gives: nobody is locked out."""
    mask = os.umask(0)
    os.umask(mask)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    wanted = {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in found}
    assert found
    assert found == wanted
