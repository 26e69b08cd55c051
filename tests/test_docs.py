"""The examples of the documentation run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.environment import CHECKOUT


def examples(page: str) -> list[str]:
    """The Python blocks of a page that are whole programs."""
    text = (CHECKOUT / "docs" / page).read_text()
    return [
        block for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "import" in block
    ]


LOGGING = examples("logging.md")


@pytest.mark.parametrize(
    ("program", "prints"),
    [
        (LOGGING[0], r"\[Info\] \[Test\] hello pid=\d+ tid=\d+ seq=0 rule=\"tv\"\n\[Warning\] \[Test\] over the limit"),
        (LOGGING[1], r"Packet 0 from 10\.0\.0\.7:5001"),
        (LOGGING[2], r"\[Error\] \[Test\] no such order"),
    ],
    ids=["first ring", "compiled", "standard library"],
)
def test_an_example_of_the_log_prints_what_it_says(tmp_path: Path, program: str, prints: str) -> None:
    file = tmp_path / "example.py"
    file.write_text(program)
    result = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(prints, result.stdout), result.stdout


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in (CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *(CHECKOUT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
