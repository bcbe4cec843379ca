"""Every command of the README and of docs/ runs, in their order, in one folder; long ones by their `--smoke` option."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import PYTHON, TORCHRUN, environment

ROOT = Path(__file__).resolve().parent.parent
#: Pages with commands, in the order in which these run: a page may use what earlier ones left in `outputs/`.
PAGES = (
    "README.md",
    "docs/data.md",
    "docs/pretraining.md",
    "docs/checkpoints.md",
    "docs/checking.md",
    "docs/conversion.md",
    "docs/adding_a_system.md",
    "docs/trust.md",
)
#: All pages, those without commands too.
ALL_PAGES = (*PAGES, "docs/glossary.md", "docs/releases.md")
#: A command that is replaced by a shorter form of itself, or (None) is what runs this very test, or takes minutes: of
#: all but AVT's, other tests run the `--smoke` form.
SHORTER = {
    "examples/quickstart/run.sh": ["examples/quickstart/run.sh", "--smoke"],
    "tests/run.sh": None,
    "examples/own_system/run.sh": None,
    **{f"examples/{name}/tiny.sh": None for name in ("avt_33b", "vlm_14b", "perceiver_fusion_xl", "dual_encoder")},
}
#: Options that make a command shorter.
SMALLER = {"tools/verify_layouts.py": ["--iterations", "2", "--global-batch-size", "4"]}
#: Folders of the repository, or of the package, whose files pages name in backquotes.
FOLDERS = (
    "megatron_mm|tools|examples|tests|docs|benchmarks|locks|config|models|parts|objectives|systems|pipeline|planner"
    "|platform|training|conversion|evaluation|checks"
)


def blocks(page: str, language: str) -> list[str]:
    """What the page's fenced blocks of a language hold."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """Lines of the pages' bash blocks, each once."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip()))


def words_of(line: str, outputs: Path) -> list[str] | None:
    """The program and arguments that stand for a command; None where it is left out.

    Args:
        outputs: folder that takes the place of the working directory before `outputs/`.
    """
    words = shlex.split(line)
    if words[0] in SHORTER:
        shorter = SHORTER[words[0]]
        if shorter is None:
            return None
        words = [*shorter, "--output", "outputs/quickstart"]
    words = [str(outputs / word) if word.startswith("outputs/") else word for word in words]
    words += next((extra for name, extra in SMALLER.items() if name in words), [])
    if words[0] == "torchrun":
        words = [*TORCHRUN[:-1], *words[1:]]
    elif words[0] == "python":
        words[0] = PYTHON
    return words


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """Outputs go to a temporary folder in place of `outputs/`, so that nothing of the user's is touched."""
    lines = commands()
    assert len(lines) > 10
    for line in lines:
        words = words_of(line, tmp_path)
        if words is None:
            continue
        done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, env=environment())
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_every_page_is_known_and_linked():
    """A page that is not listed here would keep commands that nobody runs."""
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md"} == set(ALL_PAGES)
    assert not [page for page in ALL_PAGES if page not in PAGES and blocks(page, "bash")]
    readme = (ROOT / "README.md").read_text()
    assert not [page for page in ALL_PAGES[1:] if f"({page})" not in readme]


@pytest.mark.parametrize("page", ALL_PAGES)
def test_files_that_a_page_names_exist(page):
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", (ROOT / page).read_text()):
        assert (ROOT / name).exists() or (ROOT / "megatron_mm" / name).exists(), name


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def _bare(text: str) -> list[str]:
    """Lines of code without blank ones and docstrings of one line."""
    return [line for line in text.splitlines() if line.strip() and not re.fullmatch(r' *"""[^"]*"""', line)]


@pytest.mark.parametrize("page", ALL_PAGES)
def test_code_on_a_page_is_that_of_the_file_it_names(page):
    """A block's first line names its file; what blank lines divide may stand apart there."""
    for block in blocks(page, "python"):
        first, _, code = block.partition("\n")
        lines = _bare((ROOT / first.removeprefix("# ")).read_text())
        for piece in code.strip("\n").split("\n\n"):
            shown = piece.splitlines()
            assert any(lines[at : at + len(shown)] == shown for at in range(len(lines))), f"{first}\n{piece}"
