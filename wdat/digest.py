"""Digests of code: what a result was computed with, so that it is not taken for that of another version.

Shared by the notebooks' staleness and by the cache of results. A digest goes by definitions (functions, classes,
constants of a module), not by files: it is of the parsed code without docstrings and annotations, every name of another
definition replaced by that definition's digest. So comments, layout, a moved file, a renamed function, constant, local
variable or argument change nothing; a changed operator, default, decorator or constant does in all that reaches it.

On the safe side: a class reaches all its methods, a module that is named as a whole everything below it; a function
that is passed on, decorated or called with ** belongs to its signature as written, annotations too, for it may be read;
what a module does when it is imported belongs to all that import it. Missed is what no name leads to: patches at run
time, getattr and import_module with computed names, registries that a decorator fills, the `__name__` of a function.
"""

import ast
import builtins
import functools
import hashlib
import itertools
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

COMPUTING = ("torch", "pyautoattack")  # packages whose version changes numbers
UNSEEN = {"ctx", "annotation", "returns", "type_comment", "kind"}  # fields of the tree that do not count
READERS = {"locals", "vars", "dir", "eval", "exec"}  # of the names of variables
Node = tuple[str, str]  # module and name; as names "*": all of it, "": what it does when imported, "f()": f's signature
CODE: Node = (".", "")  # what is not of the package: a notebook's


def text_digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def installed(package: str) -> str | None:
    """The version of an installed package, None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def version(name: str) -> str:
    """Of all code that a module or definition of `wdat`, by its dotted name, can reach, and of the packages it calls.

    What is not of `wdat` is told by its name; where there are no sources, the package's version must do. ValueError for
    a name that leads to no definition of its module: the whole module would stand for it.
    """
    node, rest = (package := _package()).find(name)
    if node and node[1] == "*" and rest:
        raise ValueError(f"{name} leads to no definition of {node[0]}; name one that stands there, or the module alone")
    own = [package.digest(one, {}) for one in package.value(node)] if node else [name, installed("wdat")]
    return text_digest(f"{own} {[installed(name) for name in COMPUTING]}")


def reached(code: str, apart: str = "") -> tuple[str, dict[str, str]]:
    """Digest of code outside the package with all that it reaches; and of every definition among that, on its own.

    The second is by name, the code itself "", and says what has changed when the first has. apart: a module or package
    whose definitions are left out.
    """
    code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines())  # magics
    package, found, alone = _package(), {}, {}
    package.modules[CODE[0]] = _Module(CODE[0], code)
    package.shown.pop(CODE, None)
    whole = package.digest(CODE, found, apart)
    for module, name in sorted(node for node in found if node[1] != "*"):
        text, used = package.show((module, name))
        place = f"{module}.{name}".strip(".").removesuffix("()")
        alone[place] = text_digest(f"{alone.get(place)} {text} {[node[1] for node in used]}")[:16]
    return whole, alone


def imported(tree: ast.AST, package: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names that are imported anywhere in a tree, each after the name bound to it ("" if that is its start)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((alias.asname or alias.name, f"{base}.{alias.name}") for alias in node.names)


class _Module:
    """A file: what its names stand for, and the statements that define them or ("") do something else."""

    def __init__(self, name: str, code: str, package: str = "") -> None:
        tree = ast.parse(code)
        self.name, self.imports, self.loaded, self.definitions = name, {}, set(), {}
        for bound, dotted in imported(tree, package):
            starts = list(itertools.accumulate(dotted.split("."), "{}.{}".format))
            self.loaded |= set(starts)  # those of them that are modules
            self.imports.setdefault(bound or starts[0], set()).add(dotted if bound else starts[0])
        for statement in tree.body:
            for bound in [""] if name == CODE[0] else self._bound(statement):
                self.definitions.setdefault(bound, []).append(statement)

    @staticmethod
    def _bound(statement: ast.stmt) -> list[str]:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                return [name]
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                return []
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return []
            case ast.Assign() | ast.AnnAssign():
                targets = getattr(statement, "targets", None) or [statement.target]
                parts = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.expr)]
                names = [part.id for part in parts if isinstance(part, ast.Name)]
                return names + [""] * any(isinstance(part, (ast.Attribute, ast.Subscript)) for part in parts)
        return [""]


class _Text:
    """Code as text without names of definitions and own variables, and the definitions that it names, in order."""

    def __init__(self, package: "_Package", node: Node) -> None:
        self.package, self.node, self.module = package, node, package.modules[node[0]]
        self.own, self.numbers, self.annotated = set(), {}, node[1].endswith("()")
        stars = [package.find(dotted.removesuffix(".*"))[0] for dotted in sorted(self.module.imports.get("*", ()))]
        self.used = [star for star in stars if star]
        parts = self.module.definitions.get(node[1].removesuffix("()"), [])
        if function := package.function((node[0], node[1].removesuffix("()"))):
            parts = [function.args]
            if not self.annotated:
                parts += [*function.body, *function.decorator_list]
                self.own = self._variables(function)
                self.used += package.value(node)[1:] if function.decorator_list else []
        self.text = self.show(parts)

    def _variables(self, function: ast.FunctionDef) -> set[str]:
        """Names in a function that nothing but its own code can see; none if something may look at them."""
        inside = [node for part in function.body for node in ast.walk(part)]
        names = [node for node in inside if isinstance(node, ast.Name)]
        if function.decorator_list or READERS & {node.id for node in names}:
            return set()
        stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        stored |= set(self.package.parameters(function))
        told = [node for node in inside if not isinstance(node, (ast.Name, ast.Constant, ast.Attribute, ast.keyword))]
        fields = [value if isinstance(value, list) else [value] for node in told for _, value in ast.iter_fields(node)]
        words = {word for field in fields for word in field if isinstance(word, str)}
        return stored - words - {*self.module.imports, *self.module.definitions, *dir(builtins)}

    def show(self, value: Any) -> str:
        """Text of a tree, a list of them or a plain value."""
        match value:
            case list():
                return f"[{','.join(filter(None, map(self.show, value)))}]"
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
                return ""
            case ast.Name() | ast.Attribute() if found := self.reference(value):
                return found
            case ast.Name(id=name):
                return self.variable(name)
            case ast.arg(arg=name, annotation=kind):
                return self.variable(name) + (self.show(kind) if self.annotated else "")
            case ast.Call(func=function, args=given, keywords=named) if (numbers := self.called(value)) is not None:
                named = [f"{numbers.get(one.arg, one.arg)}={self.show(one.value)}" for one in named]
                return f"{self.reference(function, called=True)}({self.show(given)},{named})"
            case ast.AST():
                parts = [part for field, part in ast.iter_fields(value) if field not in UNSEEN]
                if isinstance(value, ast.ClassDef):  # the kinds of a dataclass's fields may be read
                    parts += [part.annotation for part in value.body if isinstance(part, ast.AnnAssign)]
                return f"{type(value).__name__}({','.join(map(self.show, parts))})"
        return repr(value)

    def variable(self, name: str) -> str:
        return f"${self.numbers.setdefault(name, len(self.numbers))}" if name in self.own else name

    def find(self, tree: ast.AST) -> list[tuple[Node | None, str]]:
        """What a name, with attributes or without, may stand for: see `_Package.find`."""
        rest = ""
        while isinstance(tree, ast.Attribute):
            tree, rest = tree.value, f".{tree.attr}{rest}"
        if not isinstance(tree, ast.Name):
            return []
        own = [f"{self.module.name}.{tree.id}"] if tree.id in self.module.definitions else []
        return [self.package.find(start + rest) for start in own or sorted(self.module.imports.get(tree.id, ()))]

    def reference(self, tree: ast.AST, called: bool = False) -> str:
        """Text for a name of a definition or of something imported, which is noted; "" for other names."""
        texts = []
        for node, rest in self.find(tree):
            if node and node != self.node:
                self.used += [node] if called else self.package.value(node)
            texts.append(f"{'' if node is None else 'own' if node == self.node else '→'}.{rest}")
        return "|".join(texts)

    def called(self, call: ast.Call) -> dict[str, int] | None:
        """Numbers of the parameters by name if it calls a function of the package and nothing reads the names."""
        found = self.find(call.func)
        function = self.package.function(found[0][0]) if len(found) == 1 and not found[0][1] else None
        if function is None or function.decorator_list or not all(one.arg for one in call.keywords):
            return None
        return {name: number for number, name in enumerate(self.package.parameters(function))}


class _Modules(dict[str, _Module]):
    """Files by name, each parsed when it is first asked for: most of what is reached is a part of the package."""

    def __init__(self, files: tuple[tuple[str, str, str], ...]) -> None:
        super().__init__((name, None) for name, *_ in files)
        self.files = {name: (name, code, package) for name, code, package in files}

    def __getitem__(self, name: str) -> _Module:
        if super().__getitem__(name) is None:
            self[name] = _Module(*self.files[name])
        return super().__getitem__(name)


class _Package:
    """All definitions of the package, as its files have them."""

    def __init__(self, files: tuple[tuple[str, str, str], ...]) -> None:
        self.modules = _Modules(files)
        self.shown: dict[Node, tuple[str, list[Node]]] = {}

    def find(self, dotted: str) -> tuple[Node | None, str]:
        """The definition that a dotted name stands for, and the attributes after it; None for what is foreign."""
        starts = [start for start in itertools.accumulate(dotted.split("."), "{}.{}".format) if start in self.modules]
        if not starts:
            return None, dotted
        module, rest = self.modules[starts[-1]], dotted[len(starts[-1]) + 1 :]
        name, _, after = rest.partition(".")
        if name in module.definitions:
            return (module.name, name), after
        if len(again := module.imports.get(name, ())) == 1:
            return self.find(".".join(filter(None, [*again, after])))
        return (module.name, "*"), rest

    def function(self, node: Node | None) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """The function that a definition is, if it is one."""
        statements = self.modules[node[0]].definitions.get(node[1], []) if node else []
        one = statements[0] if len(statements) == 1 else None
        return one if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)) else None

    @staticmethod
    def parameters(function: ast.FunctionDef) -> list[str]:
        """Their names, but for those of * and **."""
        given = function.args
        return [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]

    def value(self, node: Node) -> list[Node]:
        """What a definition is where it is not just called: of a function its signature, too."""
        return [node, (node[0], f"{node[1]}()")] if self.function(node) else [node]

    def show(self, node: Node) -> tuple[str, list[Node]]:
        """A definition's text, and the definitions that it needs."""
        if node not in self.shown:
            name, word = node
            if word == "*":
                parts = sorted({(name, part) for part in self.modules[name].definitions} - {(name, "")})
                below = [(other, "*") for other in sorted(self.modules) if other.rpartition(".")[0] == name]
                self.shown[node] = f"{parts} {below}", [one for part in parts for one in self.value(part)] + below
            else:
                made = _Text(self, node)
                self.shown[node] = made.text, made.used + [one for one in self.effects(name) if one != node]
        return self.shown[node]

    def effects(self, name: str) -> list[Node]:
        """Modules that do something when they are imported, among this one and those that it loads."""
        found, more = set(), {name}
        while more:
            found |= more
            more = {one for module in more for one in self.modules[module].loaded & self.modules.keys()} - found
        return [(one, "") for one in sorted(found) if "" in self.modules[one].definitions]

    def digest(self, node: Node, found: dict[Node, str], apart: str = "") -> str:
        """Of a definition with all that it needs; `found` has those of all that were met."""
        if node not in found:
            text, used = self.show(node)
            found[node] = text_digest(text)  # what stands for it inside itself
            used = [one for one in used if not f"{one[0]}.".startswith(f"{apart}.")]
            found[node] = text_digest(" ".join([text, *(self.digest(one, found, apart) for one in used)]))
        return found[node]


def _package() -> _Package:
    """As the files are now."""
    folder, files = Path(__file__).parent, []
    for path in sorted(folder.rglob("*.py")):
        package, module = ".".join(path.relative_to(folder.parent).parent.parts), path.stem
        name = package if module == "__init__" else f"{package}.{module}"
        files.append((name, path.read_text(encoding="utf-8"), package))
    return _parsed(tuple(files))


_parsed = functools.lru_cache(maxsize=1)(_Package)
