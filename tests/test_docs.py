"""The documentation against the code: generated page, links, configurations, names of keys."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl.config import VERL_HOMES, Config, config_keys, dump_config, load_config

ROOT = Path(__file__).resolve().parents[1]
GENERATOR = ROOT / "docs" / "generate_configuration.py"
PAGE = ROOT / "docs" / "configuration.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
KEY = rf"(?:{'|'.join(Config.model_fields)})(?:\.[A-Za-z_]\w*)+"
# `section.key`, `section.key=value` and `section.key: value`
INLINE_KEY = re.compile(rf"`'?({KEY})(?:[=:][^`]*)?`")
OVERRIDE = re.compile(rf"(?:^|[\s'\"+])({KEY})=", re.MULTILINE)
FILE_NAME = re.compile(r"\.(?:cpp|json|jsonl|md|parquet|py|txt|yaml)$")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links whose file, or whose heading in a Markdown file, is not there."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = folder / name
        target_text = text if not name else ""
        if name and target.suffix == ".md" and target.is_file():
            target_text = target.read_text(encoding="utf-8")
        headings = {slug(h) for h in HEADING.findall(FENCED.sub("", target_text))}
        if (name and not target.exists()) or (anchor and anchor not in headings):
            broken.append(link)
    return broken


def unknown_keys(text: str) -> list[str]:
    """Configuration keys that the text names, in code, and that there are none of."""
    keys = config_keys()
    known = {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 2)}
    blocks = FENCED.findall(text)
    named = INLINE_KEY.findall(FENCED.sub("", text))
    named += [key for block in blocks for key in OVERRIDE.findall(block)]
    return [key for key in named if key not in known and not FILE_NAME.search(key)]


def check_page(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, GENERATOR, "--check", path], capture_output=True, text=True, check=False
    )


def test_configuration_page_is_current() -> None:
    result = check_page(PAGE)
    assert (result.returncode, result.stderr) == (0, "")


def test_check_refuses_a_stale_page(tmp_path: Path) -> None:
    stale = tmp_path / "configuration.md"
    text = PAGE.read_text(encoding="utf-8")
    stale.write_text(text.replace("`15.0`", "`14.0`"), encoding="utf-8")
    result = check_page(stale)
    assert result.returncode == 1
    assert "stale" in result.stderr and "generate_configuration.py" in result.stderr


def test_configuration_page_has_every_key_once() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| .* \| .* \| .+ \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows == config_keys()


def test_configuration_page_has_every_verl_name() -> None:
    table = PAGE.read_text("utf-8").partition("## If you come from veRL")[2]
    rows = dict(re.findall(r"^\| `(?:actor_rollout_ref\.)?([^`]+)` \| (.+) \|$", table, re.M))
    assert {old: new.strip("`") for old, new in rows.items()} == VERL_HOMES


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_file_loads_and_survives_a_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config


@each_page
def test_links_resolve(page: Path) -> None:
    assert broken_links(page.read_text(encoding="utf-8"), page.parent) == []


@each_page
def test_named_keys_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page == PAGE:  # the last table is about keys that do not exist
        text = text.partition("## If you come from veRL")[0]
    assert unknown_keys(text) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# The `one` heading\n")
    text = (
        "[ok](a.md) [ok](a.md#the-one-heading) [web](https://example.org/x.md) [here](#top)\n"
        "# Top\n[no file](b.md) [no heading](a.md#two) [no heading here](#bottom)\n"
        "```\n[in code](c.md)\n```\n"
    )
    assert broken_links(text, tmp_path) == ["b.md", "a.md#two", "#bottom"]


def test_unknown_keys_are_found() -> None:
    text = (
        "`flow.beta` `flow.beta=1` `actor.optim` `actor.optim.lr: 1e-6` `model.py` `flow/ess`\n"
        "`flow.betta` `'rollout.stops=[1]'` `trainer.total_epochs`\n"
        "```\nflowrl train x.yaml flow.beta=1 data.tasks=sums +reward.fn=x\nmodel.eval()\n```\n"
    )
    expected = ["flow.betta", "rollout.stops", "trainer.total_epochs", "data.tasks", "reward.fn"]
    assert unknown_keys(text) == expected
