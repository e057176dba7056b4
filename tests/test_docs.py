"""The documents are true: their Python runs, their commands parse, their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from visionmoe.cli.main import COMMANDS
from visionmoe.cli.parse import parse

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("decisions/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
BLOCK = re.compile(r"^```python *(notest)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ {4}(visionmoe [a-z].*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_python_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All blocks of a document, one after the other; those marked `notest` (downloads) are only compiled."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for number, (only_compiled, code) in enumerate(BLOCK.findall(document.read_text())):
        program = compile(code, f"{document.name}, block {number}", "exec")
        if not only_compiled:
            exec(program, names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_commands_parse(document: Path):
    for line in COMMAND.findall(document.read_text()):
        _, name, *arguments = shlex.split(line, comments=True)
        assert name in COMMANDS, line
        assert parse(COMMANDS[name][0], arguments, prog=f"visionmoe {name}") is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(document: Path):
    for target in LINK.findall(document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_is_finished(document: Path):
    assert not re.search(r"TODO|FIXME|XXX|@@", document.read_text())


def test_readme_knows_every_command_and_every_folder():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^ {4}visionmoe ([a-z]+)", text, re.MULTILINE)) == set(COMMANDS)
    for folder in (ROOT / "src" / "visionmoe").iterdir():
        if folder.is_dir() and (folder / "__init__.py").exists():
            assert f"{folder.name}/" in text


def test_all_recipes_are_in_the_training_document():
    from visionmoe.train.recipes import FINETUNING, FROM_SCRATCH

    text = (ROOT / "docs" / "training.md").read_text()
    assert all(f"`{name}`" in text for name in (*FROM_SCRATCH, *FINETUNING))
