"""Multicast relay."""

import os

# NumPy's linear algebra is not used here. The threads that it would start at import would keep the capabilities that
# the main thread gives up: each thread has its own.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

__version__ = "0.1.0"
