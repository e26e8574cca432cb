"""What travels with a job: its description, the user's own modules that it names, the commit and the changes since.

Modules are found by their files and are not executed. What is installed here is not carried: it must be installed on
the cluster too. Of an own package all .py files are carried, and of what they import, again, what is own.
"""

from __future__ import annotations

import ast
import importlib.machinery
import io
import os
import re
import site
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ray_jobs.errors import ConfigError

MAX_BYTES = 10 << 20
_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_WHERE = re.compile(r"(^|\.)(model|measure|data)(\.name)?$")


def own_modules(settings: Mapping[str, Any]) -> list[str]:
    """The modules of a run's or a sweep's own functions: `model: my_pkg.nets:make` -> my_pkg.nets.

    Args:
        settings: a description as plain values.
    """
    named = {
        text.partition(":")[0] for key, text in _texts(settings, "") if _WHERE.search(key) and _OWN.fullmatch(text)
    }
    return sorted(named)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) for every text in a description; lists, and the kinds of a sweep's values, add no key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            kind = name in ("grid", "choice")
            yield from _texts(part, key if kind else f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, key)


def module_files(modules: Iterable[str]) -> dict[str, bytes]:
    """Path in the package -> content, of own modules and of own modules that they import.

    Raises:
        ConfigError: a module is not there, is no Python, or is too large.
    """
    files: dict[str, bytes] = {}
    named = list(modules)
    wanted = {module.partition(".")[0] for module in named}
    done: set[str] = set()
    while wanted:
        top = wanted.pop()
        done.add(top)
        found = _own_files(top)
        files |= found
        wanted |= {name for path, text in found.items() for name in _imports(path, text)} - done
    for module in named:
        _check_there(module, files)
    if (size := sum(map(len, files.values()))) > MAX_BYTES:
        raise ConfigError(f"{', '.join(named)}: {size} bytes of Python files; a job carries at most {MAX_BYTES}")
    return files


def _check_there(module: str, files: Mapping[str, bytes]) -> None:
    top, path = module.partition(".")[0], module.replace(".", "/")
    if _spec(top) is None:
        raise ConfigError(f"{module}: there is no module {top} in {os.getcwd()} or on Python's path")
    own = any(name.partition("/")[0] in (top, f"{top}.py") for name in files)
    if own and f"{path}.py" not in files and f"{path}/__init__.py" not in files:
        raise ConfigError(f"{module}: the package {top} has no such module")


def packed(files: Mapping[str, bytes]) -> bytes:
    """A zip file; the same files make the same bytes.

    Raises:
        ConfigError: a name would leave the folder that it is unpacked in.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(_inside(name)), files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or str(path) != name
        or name == "."
    ):
        raise ConfigError(f"{name!r} cannot be the name of a file of a job")
    return name


def _spec(top: str) -> importlib.machinery.ModuleSpec | None:
    """Where a top-level module is, as `python -m phisam` run here would find it; nothing is executed."""
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        return importlib.machinery.ModuleSpec(top, None)
    return importlib.machinery.PathFinder.find_spec(top, [os.getcwd(), *sys.path])


def _own_files(top: str) -> dict[str, bytes]:
    """A module's Python files; none: it is installed, and so no own one, or it is nowhere."""
    spec = _spec(top)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    places = folders or ([spec.origin] if spec and spec.origin else [])
    if not places or top in ("ray_jobs", "phisam") or any(map(_installed, places)):
        return {}
    if not folders:
        path = Path(places[0])
        if path.suffix != ".py":
            raise ConfigError(f"{path}: an own module must be Python source: install it on the cluster instead")
        return {path.name: _read(path, path.parent)}
    files: dict[str, bytes] = {}
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            if not any(part.startswith(".") for part in Path(name).parts):
                files[name] = _read(path, folder)
    return files


def _installed(place: str) -> bool:
    """Whether a file lies where packages are installed, or comes with Python."""
    known = [
        *site.getsitepackages(),
        site.getusersitepackages(),
        *(sysconfig.get_paths()[k] for k in ("purelib", "stdlib")),
    ]
    return any(Path(place).is_relative_to(folder) for folder in known)


def _read(path: Path, folder: Path) -> bytes:
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{path} is a link to a file outside of {folder}: a job carries the package's own files alone"
            )
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _imports(path: str, text: bytes) -> Iterator[str]:
    """The top-level modules that a file imports."""
    try:
        tree = ast.parse(text, path)
    except (SyntaxError, ValueError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else path
        raise ConfigError(f"{where}: not Python: {getattr(error, 'msg', error)}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
