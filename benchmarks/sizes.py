"""Sizes of the house: lines per room, and what is larger than CONTRIBUTING.md aims for.

.venv/bin/python benchmarks/sizes.py
"""

import ast
from collections import Counter
from pathlib import Path

LIB = Path(__file__).resolve().parents[1] / "lib"
MOST = {"file": 400, "function": 50, "class": 200, "parameters": 6}


def sizes(path: Path) -> list[tuple[str, str, int]]:
    """(kind, name, size) of the file and of all that is defined in it."""
    text = path.read_text(encoding="utf-8")
    found = [("file", "", len(text.splitlines()))]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            found.append((kind, node.name, node.end_lineno - node.lineno + 1))
            if kind == "function":
                taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
                taken += [a.arg for a in node.args.kwonlyargs]
                found.append(("parameters", node.name, len([a for a in taken if a != "self"])))
    return found


rooms, large = Counter(), []
for file in sorted(LIB.rglob("*.py")):
    name = file.relative_to(LIB)
    rooms["/".join(name.parts[:2])] += sizes(file)[0][2]
    large += [(kind, f"{name} {of}", n) for kind, of, n in sizes(file) if n > MOST[kind]]
print(*(f"{lines:6} {room}" for room, lines in rooms.items()), sep="\n")
print(f"{sum(rooms.values()):6} in all")
for kind, where, n in sorted(large, key=lambda each: (each[0], -each[2])):
    print(f"{kind:10} {n:4} > {MOST[kind]:3}  {where}")
