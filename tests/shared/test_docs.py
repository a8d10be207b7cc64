"""The pages in Markdown: links and anchors resolve, the READMEs are short, every flag that they name exists."""
from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.shared.programs import ROOT, declared_options, run
from tests.shared.test_options import CASES

PAGES = sorted(path for pattern in ("*.md", "*/*.md", "*/*/*.md", "*/*/*/*.md") for path in ROOT.glob(pattern)
               if not path.relative_to(ROOT).parts[0].startswith("."))
SHORT = ("README.md", "TorchSSL/README.md", "EDM/README.md", "EDM/TDSM.md", "DDAE/README.md", "MetaSemi/README.md",
         "DASO/README.md")
MOST_WORDS = 900
# Flags of torchrun, pip, docker and sbatch.
FLAGS_OF_OTHERS = {"--nproc_per_node", "--nnodes", "--standalone", "--rdzv_backend", "--max-restarts",
                   "--signals-to-handle", "--gpus", "--all", "--extra", "--num", "--help", "--local_rank", "--null",
                   "--rm", "--cpu", "--multi_gpu", "--num_processes"}


def prose(text: str) -> str:
    """Return the text without code blocks and tables."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        found += [(str(page.relative_to(ROOT)), target) for target in re.findall(r"\]\(([^)\s]+)\)", text)
                  if not target.startswith(("http://", "https://"))]
    return found


@pytest.mark.parametrize(("page", "target"), links())
def test_link_resolves(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists(), f"{page} links to {target}, which is not there"
    assert not anchor or anchor in anchors(file), f"{page} links to {target}, but there is no such heading"


@pytest.mark.parametrize("name", SHORT)
def test_readme_is_short(name: str) -> None:
    assert len(prose((ROOT / name).read_text()).split()) <= MOST_WORDS


@cache
def every_flag() -> set[str]:
    """Return the flags of all scripts, of Python and of shell."""
    declared = {spelling for script, command in CASES for option in declared_options(script, command)
                for spelling in option.names.split()}
    shell = {flag for path in (*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh"))
             for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", path.read_text())}
    programs = {flag for folder in ("bench", "gpu") for path in (ROOT / "tests" / folder).glob("*.py")
                for flag in re.findall(r'"(--[A-Za-z][\w-]*)"', path.read_text())}
    return declared | shell | programs


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in PAGES])
def test_flags_exist(page: str) -> None:
    text = re.sub(r"^#!.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)  # of job scripts
    own = set(re.findall(r'Option\("(--[\w-]+)"', text))
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text)) - own
    assert sorted(named - every_flag() - FLAGS_OF_OTHERS) == []


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(4))
def test_example_of_an_extension_runs(number: int, tmp_path: Path) -> None:
    example = EXAMPLES[number]
    assert len(example.splitlines()) <= 35
    (tmp_path / "example.py").write_text(example)
    told = re.search(r"python \w+\.py (.*?)\"", example)
    words = told[1].split() + ["--num_train_iter=3", f"--save_dir={tmp_path}"] if told else []
    run(tmp_path / "example.py", *words, cwd=tmp_path)


def test_citation_names_the_papers() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    urls = {entry["url"] for entry in content["references"]}
    assert urls <= set(re.findall(r"\((https://[^)]+)\)", (ROOT / "README.md").read_text()))
    assert content["cff-version"] and content["title"] == "fewlabel" and len(urls) == 5
