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
LOOP = (CHECKOUT / "relay" / "dataplane" / "loop.py").read_text()


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


ARCHITECTURE = (CHECKOUT / "docs" / "architecture.md").read_text()


def test_the_architecture_names_files_that_are_there() -> None:
    named = re.findall(r"`((?:relay|logging_shm|tests|tools)/[\w/.]+)`", ARCHITECTURE)
    assert [name for name in named if not (CHECKOUT / name).exists()] == []


def test_the_architecture_names_functions_that_are_there() -> None:
    modules = [*(CHECKOUT / "relay" / "dataplane").glob("*.py"), CHECKOUT / "logging_shm" / "compiled.py"]
    defined = {name for module in modules for name in re.findall(r"^def (\w+)", module.read_text(), re.MULTILINE)}
    way = ARCHITECTURE[ARCHITECTURE.index("## One packet") : ARCHITECTURE.index("## When one")]
    named = set(re.findall(r"`([a-z_]+)`", way))
    assert len(named) > 10
    assert named - defined == set()


def test_the_loop_goes_the_way_that_is_told() -> None:
    """In the order of the page: each of its steps is called in a pass, or from what a pass calls."""
    way = ("is_filled", "read_frame", "flow_index", "observe", "add", "drain", "release")
    places = [ARCHITECTURE.index(f"`{name}`", ARCHITECTURE.index("## One packet")) for name in way]
    assert places == sorted(places)
    assert [name for name in way if f" {name}(" not in LOOP] == []


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in (CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *(CHECKOUT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
