"""The tutorial's commands, taken out of the two pages and executed on the demo's own album, and its table of claims."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from typer.testing import CliRunner

from metagpen.album import OWN_ALBUM
from metagpen.cli import app
from metagpen.faces import load_photo
from metagpen.finetune import Options

PAGES = {"en": REPOSITORY / "docs" / "tutorial.md", "zh": REPOSITORY / "docs" / "tutorial.zh-CN.md"}
ITERATIONS = 2  # what 2,000 is replaced with here, in the options file and in the names of the checkpoints
FEWER = ((r"total_iters: \d+", f"total_iters: {ITERATIONS}"), (r"_2000\.", f"_{ITERATIONS}."),
         (r"warmup_iter: \d+", "warmup_iter: 0"), (r"--num-workers \d+", "--num-workers 0"))  # fmt: skip

sys.path.insert(0, str(REPOSITORY / "benchmarks"))


def fenced(page: Path, language: str) -> list[str]:
    """The contents of the page's code blocks in this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[str]:
    """Every command line of the page."""
    return (line for block in fenced(page, "bash") for line in block.splitlines() if line.strip())


def smaller(text: str) -> str:
    """The text with the numbers that cost time made small."""
    for pattern, few in FEWER:
        text = re.sub(pattern, few, text)
    return text


def execute(line: str, folder: Path) -> None:
    """`metagpen` runs in this process, which has imported it already; everything else in a shell."""
    if not line.startswith("metagpen "):
        subprocess.run(line, shell=True, check=True, cwd=folder)
        return
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


def test_every_command_of_the_tutorial_runs(tmp_path, monkeypatch):
    """From photos to a restored one, by the commands as they are printed, with fewer iterations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_photos").mkdir()
    *photos, old = sorted((OWN_ALBUM / "ada").glob("*.jpg"))[:5]
    for photo in photos:
        shutil.copy(photo, tmp_path / "my_photos")
    shutil.copy(old, tmp_path / "old.jpg")
    options, = fenced(PAGES["en"], "yaml")
    (tmp_path / "options.yml").write_text(smaller(options))
    made = []
    for line in commands(PAGES["en"]):
        (tmp_path / "new.png").unlink(missing_ok=True)
        execute(smaller(line), tmp_path)
        if line.startswith("metagpen restore"):
            made.append((tmp_path / "new.png").read_bytes())
    by_model, by_person, sheet = made
    assert by_model == by_person != sheet, "the model's file and the Person's mean the same strength"
    execute("metagpen restore -i old.jpg -o new.png", tmp_path)
    assert (tmp_path / "new.png").read_bytes() != by_person, "two iterations are few, but show"
    assert load_photo(tmp_path / "new.png").size == load_photo(old).size
    models = tmp_path / "experiments" / "ada" / "models"
    assert {path.name for path in models.iterdir()} == {f"net_g_{ITERATIONS}.safetensors",
                                                        f"person_{ITERATIONS}.safetensors"}  # fmt: skip
    assert "held out" in (tmp_path / "experiments" / "ada" / "train.log").read_text()
    script, = fenced(PAGES["en"], "python")
    names: dict = {}
    exec(smaller(script), names)
    assert names["own"].size == names["model"].size and names["person"].metadata["steps"] == ITERATIONS


def test_both_languages_hold_the_same_commands_and_options():
    english, chinese = PAGES["en"], PAGES["zh"]
    assert list(commands(english)) == list(commands(chinese))
    assert fenced(english, "yaml") == fenced(chinese, "yaml")
    code = [re.sub(r" *#.*", "", fenced(page, "python")[0]) for page in (english, chinese)]
    assert code[0] == code[1]


def test_every_key_in_the_tables_of_keys_exists():
    """Each key that the two tables explain is one that the options file accepts."""
    for page in PAGES.values():
        cells = [line.split("|")[1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
        keys = [key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)]
        assert len(keys) > 20
        assert set(keys) <= set(known_keys(Options)), page


def known_keys(model: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys, with and without the sections before them."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        yield from {name, dotted, ".".join(dotted.split(".")[-2:])}
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields"):
                yield from known_keys(kind, f"{dotted}.")


def test_the_printed_options_are_the_tutorials(tmp_path):
    options = Options.from_dict(yaml.safe_load(fenced(PAGES["en"], "yaml")[0]))
    assert options.train.total_iters == 2000 and options.train.scheduler.eta_min == 1e-6
    assert options.label == "ada" and not options.datasets.train.use_rot


@pytest.mark.parametrize("language", PAGES)
def test_the_table_of_claims_says_what_was_measured_and_nothing_else(language):
    import tutorial_claims

    found = json.loads(tutorial_claims.RESULTS.read_text()) if tutorial_claims.RESULTS.exists() else None
    text = PAGES[language].read_text(encoding="utf-8")
    begin, end = tutorial_claims.MARKERS
    assert text[text.index(begin) + len(begin) : text.index(end)].strip() == tutorial_claims.table(found, language)
    if found is None:
        assert tutorial_claims.TEXT[language]["missing"] in text


def test_the_claims_are_summed_up_over_people():
    """Means, and differences paired by person, from records made up here."""
    import tutorial_claims

    config = tutorial_claims.Claims(people=2, iterations=20)
    records = []
    for person, base in (("a", 20.0), ("b", 24.0)):
        before = {"psnr": base, "ssim": 0.5, "identity": 0.4, "lpips": None}
        for variant, more in (("tutorial", 1.0), ("short", 0.9), ("step-decay", 0.7), ("rotation", 0.4), ("fresh", 1.0),
                              ("lora", 1.2), ("adapt", 0.3)):  # fmt: skip
            after = {**before, "psnr": base + more, "identity": 0.4 + more / 10}
            series = [{"iter": 0, **before}, {"iter": 20, **after}]
            records.append({"person": person, "variant": variant, "before": before, "after": after, "seconds": 60.0,
                            "series": series, "commit": "c", "machine": "m"})  # fmt: skip
    found = tutorial_claims.summary(config, records)
    assert found["variants"]["tutorial"]["psnr"]["mean"] == pytest.approx(23.0)
    assert found["variants"]["tutorial"]["psnr_gain"]["mean"] == pytest.approx(1.0)
    cells = dict(zip(("way", "time", "psnr", "lpips", "cosine", "rotation", "lora"),
                     tutorial_claims.figures(found, tutorial_claims.TEXT["en"])))  # fmt: skip
    assert cells["way"] == "after 20: +1.00 [+1.00, +1.00] dB" and cells["time"] == "1.0 min"
    assert cells["psnr"] == "23.00 dB, +1.00 [+1.00, +1.00] (model before: 22.00 dB)"
    assert cells["lpips"].startswith("not available") and cells["cosine"] == "+0.20 dB [+0.20, +0.20]"
    assert cells["rotation"].startswith("-0.50 dB") and cells["lora"].startswith("+0.20 dB")
    for language in PAGES:
        assert "2000" in tutorial_claims.table(found, language)


def test_the_figures_of_the_chinese_readme_are_those_of_the_original():
    import first_light

    begin, end = first_light.MARKERS
    readme, chinese = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    figures = readme[readme.index(begin) + len(begin) : readme.index(end)]
    assert chinese[chinese.index(begin) + len(begin) : chinese.index(end)].strip() == (
        first_light.in_chinese(figures).strip())  # fmt: skip
    assert not re.search(r"[a-z]{4,}", re.sub(r"\(docs/.*?\)", "", first_light.in_chinese(figures)))


def test_the_chinese_readme_holds_the_same_commands_and_figures():
    """A translation may not say other numbers than its original."""
    texts = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    blocks = [[re.sub(r" *#.*", "", block) for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)]
              for text in texts]  # fmt: skip
    assert blocks[0] == blocks[1]
    tables = [[re.findall(r"[-+]?\d[\d.]*", line) for line in text.splitlines() if line.startswith("| ")]
              for text in texts]  # fmt: skip
    assert len(tables[0]) >= 7 and tables[0] == tables[1]
    links = [sorted(set(re.findall(r"\]\(((?!README)[^)]+)\)", text.replace(".zh-CN", "")))) for text in texts]
    assert links[0] == links[1]
    assert "](README.zh-CN.md)" in texts[0] and "](README.md)" in texts[1]


@pytest.fixture(autouse=True)
def keep_the_random_state():
    """The commands run in this process; whatever they draw must not reach other tests."""
    with torch.random.fork_rng(devices=[]):
        yield
