"""`python -m logging_shm` is mcrlog."""

from logging_shm.cli.main import main

if __name__ == "__main__":
    main(prog_name="mcrlog")
