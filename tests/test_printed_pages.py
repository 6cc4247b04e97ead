"""Pages that a program prints from committed results say what it prints."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {"gpu-results.md": ["gpu_page.py"], "study-results.md": ["study_claims.py", "docs/study"]}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_its_program_prints(page):
    program, *arguments = PAGES[page]
    command = [sys.executable, f"benchmarks/{program}", *arguments]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == (ROOT / "docs" / page).read_text()
