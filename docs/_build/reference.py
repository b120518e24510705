"""The reference's pages, from the `__all__` of each room and the docstrings of what it names.

The source is read, not imported: no backend is needed to build the site.
"""

import ast
import inspect
import itertools
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "keras_lipnext"

# Rooms with public names, in the order in which a reader meets them.
ROOMS = (
    "models",
    "layers",
    "optimizers",
    "losses",
    "metrics",
    "callbacks",
    "certification",
    "guarantees",
    "lmi",
    "manifolds",
)
# Sections of docstrings whose lines are `name: what it is`.
LISTS = ("Args", "Call arguments", "Attributes", "Raises")
# What Keras or the library calls, not who uses a layer, loss, metric or optimizer.
HOOKS = {
    "adam",
    "build",
    "call",
    "compute_loss",
    "compute_output_shape",
    "demanded_share",
    "direction_precision",
    "from_config",
    "get_build_config",
    "get_compile_config",
    "get_config",
    "manifold_step",
    "read_constants",
    "rough",
    "update_step",
    "values",
}


def parsed(module):
    """(file, syntax tree) of a module by its dotted name."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file, ast.parse(file.read_text())


def public_names(module):
    """`__all__` of a module."""
    file, tree = parsed(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{file} has no `__all__`.")


def is_public(name):
    return any(name in public_names(f"keras_lipnext.{room}") for room in ROOMS)


def home(module, name):
    """The module from which `module` imports `name`: itself, where `name` is a module in it."""
    for node in parsed(module)[1].body:
        if isinstance(node, ast.ImportFrom) and any(a.name == name for a in node.names):
            return node.module
    raise ValueError(f"{module} does not import {name}.")


def markdown(docstring):
    """A docstring's sections as Markdown: `Args:` and the like as lists."""
    parts = re.split(r"^([A-Z][a-z]+(?: [a-z]+)?):\n(?=    |\n+ *```)", docstring, flags=re.M)
    text = [parts[0]]
    for title, rest in zip(parts[1::2], parts[2::2]):
        indented = re.match(r"(?:    .*\n?|\n(?=\n*    ))*", rest)[0]
        body, after = inspect.cleandoc(indented), rest[len(indented) :]
        if title in LISTS:
            body = re.sub(r"^(\*{0,2}\w[\w., *]*): ", r"- `\1`: ", body, flags=re.M)
            body = re.sub(r"^    (?=\S)", "  ", body, flags=re.M)
        text += ["", f"**{title}**", "", body, "", after]
    return "\n".join(text).strip()


def signature(node, inside):
    """A function's parameters and defaults, without `self` and annotations."""
    arguments = ast.parse(ast.unparse(node)).body[0].args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [a for a in (arguments.vararg, arguments.kwarg) if a]
    for argument in every:
        argument.annotation = None
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    if inside and not static and arguments.args:
        arguments.args.pop(0)
    return f"({ast.unparse(arguments)})"


def of_kind(node, *kinds):
    return any(ast.unparse(d).split(".")[-1] in kinds for d in node.decorator_list)


def directive(kind, name, room, body, options=(), depth=3):
    fence = ":" * depth
    lines = [f"{fence}{{py:{kind}}} {name}", f":module: {room}", *options, "", body, fence]
    return "\n".join(lines) + "\n"


def defined(module, name):
    """[(module, syntax tree)] of a class or function of this library that a module names."""
    tree = parsed(module)[1]
    homes = [module]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE.name):
            homes += [node.module for alias in node.names if alias.name == name]
    return [
        (home, node)
        for home in homes
        for node in parsed(home)[1].body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name
    ]


def static_functions(module, cls):
    """Functions of a module that a class takes as they are: `name = staticmethod(function)`."""
    for node in cls.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("staticmethod("):
            ((_, function),) = defined(module, node.value.args[0].id)
            function.name, function.decorator_list = node.targets[0].id, [node.value.func]
            yield function


def ancestry(module, node):
    """A class, and those of this library that it inherits from, nearest first."""
    yield node
    for base in map(ast.unparse, node.bases):
        for source, parent in defined(module, base):
            yield from ancestry(source, parent)


def methods(classes):
    """Public methods and properties of a class, and of what has no entry of its own above it."""
    own = itertools.takewhile(lambda cls: cls is classes[0] or not is_public(cls.name), classes)
    seen = set(HOOKS)
    for node in (member for cls in own for member in cls.body):
        if isinstance(node, ast.FunctionDef) and node.name not in seen:
            seen.add(node.name)
            if ast.get_docstring(node) and not node.name.startswith("_"):
                yield node


def entry(room, name, node, module):
    """The directive of a class or function."""
    doc = ast.get_docstring(node)
    if doc is None:
        raise ValueError(f"{room}.{name} has no docstring.")
    text = markdown(doc)
    if isinstance(node, ast.FunctionDef):
        return directive("function", name + signature(node, False), room, text)
    classes = list(ancestry(module, node))
    initial = [n for cls in classes for n in cls.body if getattr(n, "name", None) == "__init__"]
    call = signature(initial[0], True) if initial else ""
    body = [text, ""]
    for method in [*methods(classes), *static_functions(module, node)]:
        text = markdown(ast.get_docstring(method))
        if of_kind(method, "property", "cached_property"):
            body.append(directive("property", f"{name}.{method.name}", room, text))
        else:
            options = [
                f":{kind}:" for kind in ("classmethod", "staticmethod") if of_kind(method, kind)
            ]
            title = f"{name}.{method.name}{signature(method, True)}"
            body.append(directive("method", title, room, text, options))
    return directive("class", name + call, room, "\n".join(body), depth=4)


def entries(room, name):
    """The Markdown of one public name; of a module, that of all its functions."""
    source = home(room, name)
    is_module = source == room
    if is_module:
        source = f"{room}.{name}"
    tree = parsed(source)[1]
    nodes = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    if is_module:
        text = [f":::{{py:module}} {source}\n:::\n", markdown(ast.get_docstring(tree)), ""]
        return "\n".join(
            text + [entry(source, n.name, n, source) for n in nodes if n.name[0] != "_"]
        )
    (node,) = [n for n in nodes if n.name == name]
    return entry(room, name, node, source)


def targets():
    """{name as it may be written: the reference's name} of all that is public."""
    found = {}
    for room in ROOMS:
        found |= {f"{start}.{room}": f"keras_lipnext.{room}" for start in ("keras_lipnext", "lip")}
        for name in public_names(f"keras_lipnext.{room}"):
            full = f"keras_lipnext.{room}.{name}"
            for written in (full, f"lip.{room}.{name}", f"{room}.{name}"):
                found[written] = full
            if name[0].isupper():
                found[name] = full
    for name in public_names("keras_lipnext"):
        homes = [r for r in ROOMS if name in public_names(f"keras_lipnext.{r}")]
        if homes:
            full = f"keras_lipnext.{homes[0]}.{name}"
            found |= {f"lip.{name}": full, f"keras_lipnext.{name}": full, name: full}
    return found


def pages():
    """{file: Markdown}: an index, and a page a room with everything in its `__all__`."""
    index = ["# Reference", "", "From the docstrings, room by room.", ""]
    found = {}
    for room in ROOMS:
        module = f"keras_lipnext.{room}"
        _, tree = parsed(module)
        first, _, rest = ast.get_docstring(tree).partition("\n\n")
        names = sorted(public_names(module), key=str.lower)
        links = ", ".join(f"[`{name}`](#{module}.{name})" for name in names)
        index += [f"[**{room}**]({room}.md): {first}", f": {links}", ""]
        text = [f"({module})=", f"# {module}", "", first, "", rest, ""]
        for name in names:
            text += [f"## {name}", "", entries(module, name)]
        found[f"reference/{room}.md"] = "\n".join(text)
    index += ["```{toctree}", ":hidden:", "", *ROOMS, "```", ""]
    found["reference/index.md"] = "\n".join(index)
    return found
