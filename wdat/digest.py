"""Digests of code: what a result was computed with, so that it is not taken for that of another version.

Shared by the notebooks' staleness and by the cache of results. Digests are of the parsed code without docstrings:
comments and layout do not count.
"""

import ast
import functools
import hashlib
import re
from importlib import metadata
from pathlib import Path

COMPUTING = ("torch", "pyautoattack")  # packages whose version changes numbers


def text_digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def version(module: str) -> str:
    """Of all code that this module can reach: its `wdat` modules as `library` has them, and the packages they call.

    Also where `wdat` is an installed wheel; without sources (compiled files alone) its version number must do.
    """

    def installed(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    reached = library(f"import {module}")
    return text_digest(f"{reached or installed('wdat')} {[installed(name) for name in COMPUTING]}")


def library(code: str) -> dict[str, str]:
    """Module file -> digest, for every `wdat` module that this code imports, directly or through others.

    Digests are of the parsed code without docstrings, so that comments and layout do not count. Code that imports
    `wdat` itself, or something from it that is no module, is taken to reach every module.
    """
    package = Path(__file__).parent
    files = {_dotted(path.relative_to(package.parent)): path for path in sorted(package.rglob("*.py"))}
    code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines())  # magics
    waiting, digests = imported(ast.parse(code), set(files)), {}
    while waiting:
        module = waiting.pop()
        tree = ast.parse(files[module].read_text(encoding="utf-8"))
        digests[module] = text_digest(ast.dump(_bare(tree)))
        waiting |= imported(tree, set(files)) - set(digests)
    return {files[module].relative_to(package.parent).as_posix(): digests[module] for module in sorted(digests)}


def imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """Those of `modules` (dotted names, packages without .__init__) that code imports itself, and their packages."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        else:
            continue
        found |= {name for name in names if name in modules}
    if "wdat" in found:  # something of the front door, which may come from anywhere
        return set(modules)
    return found | {name[: dot.start()] for name in found for dot in re.finditer(r"\.", name)}


def _dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _bare(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree
