"""Every test, in two halves at once: system tests, which mostly wait, and beside them all others, which mostly compute.

    python -m tools.suite

The others have the lowest priority, so that real traffic has the cores first. Their output follows that of the system
tests, which ends with the slowest of them. Exit status 1 when a test of either half failed.
"""

import subprocess
import sys
import tempfile

SYSTEM_TESTS = "tests/system"
SLOWEST_TOLD = 30
LOWEST_PRIORITY = ("nice", "-n", "19")


def pytest(*arguments: str) -> list[str]:
    """The command for a part of the tests."""
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def main() -> None:
    """Run both halves."""
    with tempfile.TemporaryFile() as output:
        others = subprocess.Popen(
            [*LOWEST_PRIORITY, *pytest(f"--ignore={SYSTEM_TESTS}")], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            system = subprocess.call(pytest(SYSTEM_TESTS, f"--durations={SLOWEST_TOLD}"))
            others.wait()
        finally:
            others.terminate()
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    sys.exit(1 if system or others.returncode else 0)


if __name__ == "__main__":
    main()
