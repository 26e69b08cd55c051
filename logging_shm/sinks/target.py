"""Opening a log file, with errors that say why not. Imports nothing that is compiled."""

import errno
import os
import stat
from pathlib import Path

FILE_MODE = 0o640


def open_log(path: Path) -> int:
    """A descriptor that appends to `path`. Raises OSError for a symbolic link and for what is no file, too.

    A link is refused as the relay may run as root, and the directory may be another's to write.
    """
    # Without O_NONBLOCK, a FIFO that nobody reads would be waited for.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, FILE_MODE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link") from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is neither a file nor a character device") from None
        raise
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is neither a file nor a character device")
    os.set_blocking(fd, True)
    return fd


def check_log(path: Path) -> None:
    """Raises OSError where `open_log` would; makes no file."""
    existed = os.path.lexists(path)
    os.close(open_log(path))
    if not existed:
        path.unlink()
