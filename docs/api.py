"""Writes docs/api.md, the reference of the public API, from its source: `python docs/api.py`.

The public API is what `pipeline.__all__` names. Signatures, fields and docstrings are read from the source text, so
nothing but `pipeline` itself is imported, and the page is the same on every machine.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pipeline  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
HEAD = """# Public API

Everything here is imported as `from pipeline import NAME`. Names and their meaning stay the same within a minor
version. What this page does not name may change in any release. `pipeline.__version__` is the release.

`python docs/api.py` makes this page from the docstrings; `tests/test_docs.py` fails where it is out of date. Names of
types such as `Positive` stand for ranges of numbers (`pipeline/ranges.py`). A configuration's fields are the flags of
its job.
"""
SECTION = re.compile(r"^(Args|Attributes|Keys|Returns|Raises):$")


def page() -> str:
    """The whole page as Markdown."""
    names = [name for name in pipeline.__all__ if name != "__version__"]
    links = ", ".join(f"[{name}](#{name.lower()})" for name in names)
    return "\n".join([HEAD, links, *(line for name in names for line in entry(name))]) + "\n"


def entry(name: str) -> Iterator[str]:
    """One public name: where it is, how it is called, what its docstring says."""
    module = pipeline._PUBLIC[name]
    file = f"{module.replace('.', '/')}.py"
    defined = {getattr(n, "name", ""): n for n in ast.parse((ROOT / file).read_text()).body}
    node = defined[name]
    yield f"\n## {name}\n\n[{file}](../{file})\n"
    if isinstance(node, ast.FunctionDef):
        yield f"```python\n{signature(node)}\n```\n"
    yield from described(node)
    if isinstance(node, ast.FunctionDef) and node.args.kwarg:
        settings = ast.unparse(node.args.kwarg.annotation).removeprefix("Unpack[").removesuffix("]")
        yield f"`{settings}`:\n"
        yield from described(defined[settings])
    if isinstance(node, ast.ClassDef):
        yield from fields(node, choices(file) | choices("pipeline/config.py"))
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                is_value = any(ast.unparse(one).endswith("property") for one in part.decorator_list)
                yield f"\n`{name}.{part.name}`\n" if is_value else f"\n```python\n{signature(part)}\n```\n"
                yield from described(part)


def signature(node: ast.FunctionDef) -> str:
    """A function's call, an argument a line where it is long."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({ast.unparse(node.args)}){returns}"
    if len(line) <= 100:
        return line

    def one(arg: ast.arg, default: ast.expr | None) -> str:
        return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else "")

    places = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(places) - len(node.args.defaults)) + node.args.defaults
    words = [one(*pair) for pair in zip(places, defaults, strict=True)]
    words += ["*"] * bool(node.args.kwonlyargs)
    words += [one(*pair) for pair in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    words += [f"**{ast.unparse(node.args.kwarg)}"] if node.args.kwarg else []
    return f"{node.name}(\n    " + ",\n    ".join(words) + f",\n){returns}"


def described(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """A docstring, its sections as lists."""
    for block in (ast.get_docstring(node) or "").split("\n\n"):
        first, _, rest = block.strip("\n").partition("\n")
        if section := SECTION.match(first):
            yield f"{section[1]}:\n"
            text = textwrap.dedent(rest)
            is_list = section[1] != "Returns"
            yield "\n".join(
                f"- {one}" if is_list and not one.startswith(" ") else one for one in text.split("\n")
            )
        else:
            yield block
        yield ""


def choices(file: str) -> dict[str, str]:
    """The types of a module that list the values a setting may have, by name."""
    nodes = (n for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.Assign))
    texts = {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in nodes}
    return {name: text for name, text in texts.items() if text.startswith("Literal[")}


def fields(node: ast.ClassDef, named: dict[str, str]) -> Iterator[str]:
    """The fields of a dataclass, with their defaults and docstrings.

    Args:
        named: texts of types that stand for their names.
    """
    rows = []
    for part, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(part, ast.AnnAssign) or ast.unparse(part.target).startswith("_"):
            continue
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        words = " ".join(str(after.value.value).split()) if is_text else ""
        hint = re.sub(r"\w+", lambda word: named.get(word[0], word[0]), ast.unparse(part.annotation))
        default = ast.unparse(part.value) if part.value else ""
        default = re.sub(r"^field\(default_factory=(\w+)\)$", r"\1()", default)
        cells = f"`{ast.unparse(part.target)}`", f"`{hint}`", f"`{default}`" if default else "", words
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if rows:
        yield "\n".join(["| field | type | default | |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    PAGE.write_text(page())
