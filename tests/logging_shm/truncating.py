"""mcrlog, while the owner of a segment cuts it short at the worst moment: when it has been attached, before it is read.

python -m tests.logging_shm.truncating ARGUMENTS OF MCRLOG
"""

import os
from typing import Any

from logging_shm.cli.main import main
from logging_shm.segment import SHM_DIRECTORY, Segment

attach = Segment.attach


def attach_and_truncate(name: str, *arguments: Any, **options: Any) -> Segment:
    """As attach; then nothing is left of the segment."""
    segment = attach(name, *arguments, **options)
    os.truncate(SHM_DIRECTORY / name, 0)
    return segment


if __name__ == "__main__":
    Segment.attach = attach_and_truncate  # type: ignore[method-assign]
    main()
