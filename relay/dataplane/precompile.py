"""Fill the cache of compiled code: `python -m relay.dataplane.precompile`, run by `make setup`."""

import shutil

from logging_shm.precompile import compile_reader
from relay.dataplane import CACHE_DIRECTORY
from relay.dataplane.template import load_compiled_code


def main() -> None:
    """Compile for the present sources, and remove what was compiled from former ones."""
    load_compiled_code()
    compile_reader()
    for directory in CACHE_DIRECTORY.parent.iterdir():
        if directory != CACHE_DIRECTORY:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
