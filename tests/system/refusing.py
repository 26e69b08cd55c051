"""Runs a command under a seccomp filter that refuses a system call, as a container's profile does.

    python -m tests.system.refusing NUMBER ERRNO COMMAND…

Classic BPF over struct seccomp_data, linux/seccomp.h. The filter is inherited by all children, and nobody can lift it.
"""

import ctypes
import os
import struct
import sys

PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ERRNO = 0x0005_0000
SECCOMP_RET_ALLOW = 0x7FFF_0000
LD_WORD_ABS, JEQ_K, RET_K = 0x20, 0x15, 0x06  # linux/bpf_common.h


def main() -> None:
    """Install the filter, become the command."""
    number, error = map(int, sys.argv[1:3])
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (LD_WORD_ABS, 0, 0, 0),
            (JEQ_K, 0, 1, number),
            (RET_K, 0, 0, SECCOMP_RET_ERRNO | error),
            (RET_K, 0, 0, SECCOMP_RET_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program)
    filter_program = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(filter_program), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()
