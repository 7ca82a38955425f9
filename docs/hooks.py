"""What mkdocs adds to the pages of this folder: files of the repository's root, the examples, the API reference, and
all keys of the configurations.

The reference has a page for the library and one for each room, with the names in its `__all__` and their docstrings;
mkdocstrings reads the sources and imports nothing.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "metagpen"
ROOT_PAGES = {
    "README.md": "overview.md",
    "README.zh-CN.md": "overview.zh-CN.md",
    "CHANGELOG.md": "changes.md",
    "metagpen/weights/MODEL_CARD.md": "model_card.md",
}
LEVEL = "\n    options:\n      heading_level: 2\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {page: from_root((ROOT / source).read_text(encoding="utf-8")) for source, page in ROOT_PAGES.items()}
    pages["examples.md"] = examples_page(sorted((ROOT / "examples").glob("*.py")))
    pages["reference/configuration.md"] = configuration_page()
    pages |= {f"reference/{name}.md": reference_page(name) for name in ("metagpen", *rooms())}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of this folder, to files that are pages here."""
    for source, page in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({page})")
    return markdown


def from_root(text: str) -> str:
    """The text of a file of the root, its links as they are from this folder."""
    for source, page in ROOT_PAGES.items():
        text = text.replace(f"]({source})", f"]({page})")
    return text.replace("](examples/)", "](examples.md)").replace("](docs/", "](")


def examples_page(files: list[Path]) -> str:
    """Each example's docstring and code."""
    parts = ["# Examples\n\nThey run from the repository's root on the model in the package, and all but "
             "`sample_album.py` without arguments, on its album."]
    for file in sorted(files, key=lambda file: file.stem != "quickstart"):
        code = file.read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(code)) or ""
        body = code.split('"""', 2)[2].strip()
        parts.append(f"## {file.name}\n\n{said}\n\n??? example \"The code\"\n\n"
                     + "".join(f"    {line}\n" for line in ["```python", *body.splitlines(), "```"]))
    return "\n\n".join(parts)


def configuration_page() -> str:
    """Every key of every configuration: its type, default and meaning; what a mapping holds is a section below it."""
    from metagpen.adaptation.config import AdaptConfig
    from metagpen.evaluate.curve import CurveConfig
    from metagpen.evaluate.protocol import EvaluateConfig
    from metagpen.meta.train import MetaConfig
    from metagpen.recognise.distil import DistilConfig
    from metagpen.train import TrainConfig

    parts = ["# Configuration\n\nAll keys that `-c file.yml` and `-s key=value` take, from the sources. A key without "
             "a default must be given. Keys of a mapping are reached with a dot: `-s adapt.steps=8`."]
    for command, config in {"train": TrainConfig, "meta-train": MetaConfig, "adapt and adapt-many": AdaptConfig,
                            "evaluate": EvaluateConfig, "curve": CurveConfig,
                            "python -m metagpen.recognise.distil": DistilConfig}.items():
        parts += [f"## {command}", *(section(*one) for one in with_inner(config, ""))]
    return "\n\n".join(parts)


def with_inner(config: type[BaseModel], where: str) -> Iterator[tuple[type[BaseModel], str]]:
    """A configuration, then those of its mappings, each with the key that it is under."""
    yield config, where
    for name, field in config.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from with_inner(kind, f"{where}{name}.")


def section(config: type[BaseModel], where: str) -> str:
    """A table of one configuration's keys, after what its docstring says."""
    said = inspect.cleandoc(config.__doc__ or "")
    lines = [f"| `{where}{name}` | {kind_of(field)} | {default_of(field)} | {field.description or ''} |"
             for name, field in config.model_fields.items()]
    head = f"### {where.rstrip('.')}\n\n" if where else ""
    return head + "\n".join([said, "", "| key | type | default | |", "|---|---|---|---|", *lines])


def kind_of(field: FieldInfo) -> str:
    kind = field.annotation
    name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    name = re.sub(r"typing\.Annotated\[([\w.]+), .*?\)\]\)\]", r"\1", name)  # limits are told when they are passed
    return "`" + re.sub(r"[\w.]+\.(?=\w)", "", name).replace("NoneType", "None").replace("|", "or") + "`"


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{str(value) if isinstance(value, Path) else repr(value)}`".replace("|", "\\|")


def rooms() -> list[str]:
    """Packages of the library that say what is public in them."""
    return [name for folder in sorted(PACKAGE.iterdir()) if (name := folder.name) and public_names(name)]


def public_names(room: str) -> list[str]:
    """The names in the `__all__` of a room, or of the library for "metagpen"; none without one."""
    file = PACKAGE / ("" if room == "metagpen" else room) / "__init__.py"
    if not file.is_file():
        return []
    if room == "metagpen":
        import metagpen  # whose names are computed; it imports nothing heavy

        return [name for name in metagpen.__all__ if not name.startswith("__")]
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def reference_page(room: str) -> str:
    """The room's own docstring, then a section for every public name."""
    path = "metagpen" if room == "metagpen" else f"metagpen.{room}"
    file = PACKAGE / ("" if room == "metagpen" else room) / "__init__.py"
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    sections = [f"::: {path}.{name}{LEVEL}" for name in public_names(room)]
    return "\n\n".join([f"# {path}", said, *sections])
