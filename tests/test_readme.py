"""README.md and docs/ say nothing that does not run: the gate's blocks, commands, sample configs, sample code, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from transcoder import cli
from transcoder.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)
    return [block.replace("\\\n", " ") for block in found]


@pytest.mark.parametrize(
    ("name", "command"),
    [("install", "pip install -e ."), ("demo", "transcoder demo"), ("tests", 'pip install -e ".[dev]" && pytest')],
)
def test_the_gate_finds_its_blocks(name: str, command: str) -> None:
    found = re.findall(rf"^<!-- ci:{name} -->\n```bash\n(.*?)```\n<!-- ci:end -->$", README, flags=re.M | re.S)
    assert found == [command + "\n"]
    assert f"readme {name}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@each_page
def test_every_command_parses(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for block in blocks("bash", text) for line in block.splitlines()]
    ours = [words[1:] for words in commands if words[:1] == ["transcoder"]]
    assert len(ours) >= 4 or page.name != "README.md" or page.parent != ROOT
    parser, parsers = cli._parsers()
    for words in ours:
        rest, settings = cli._take_settings(words, parsers[words[0]])
        options = parser.parse_args(rest)
        if getattr(options, "config", "my.yaml") != "my.yaml":
            RunConfig.load(options.config, settings)


def test_the_table_names_every_command() -> None:
    assert set(re.findall(r"^\| `transcoder (\w+)", README, flags=re.M)) == set(cli.COMMANDS)


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    text = " ".join(README.split())
    for code in set(cli.Exit) - {cli.Exit.PIPE}:
        assert re.search(rf"\b{code} [a-z]", text[text.index("Exit codes:") :]), code


@each_page
def test_sample_configs_load(page: Path) -> None:
    for sample in blocks("yaml", page.read_text(encoding="utf-8")):
        assert RunConfig.from_dict(yaml.safe_load(sample)).transcoder.widths == (128, 512, 1024)


@pytest.mark.slow
def test_the_sample_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample = "\n".join(blocks("python"))
    # Short versions of the same runs.
    steps, shorter = ("200", "00000200"), ("12", "00000012")
    for one, other in zip(steps, shorter, strict=True):
        sample, found = re.subn(rf"(?<![0-9]){one}\b", other, sample)
        assert found, one
    names: dict[str, Any] = {}
    exec(compile(sample, "README.md", "exec"), names)
    assert names["y_hat"].shape == (4, names["model"].config.d_out)
    for run in ("short", "own-batches", "from-cache"):
        assert (tmp_path / "runs" / run / "report.html").stat().st_size > 0


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^":]+)"', text):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_site() -> None:
    """mkdocs itself says so too, in the gate."""
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (*PAGES[2:], *(ROOT / "docs").glob("*.ipynb")):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in listed, page
