"""Imports a user's own family, also from the working folder, and checks it."""

import importlib
import os
import sys
import traceback
from typing import Any, cast

from rawloop.contracts import Family, has
from rawloop.errors import RawloopError, UserError, nearest

REQUIRED = ("load_model", "check", "example", "collate", "losses")


def own_family(path: str, config: Any) -> Family:
    """Import `package.module:Class`, call it with the model's config, and check that the result is a family.

    An error in the user's code becomes one line with its place, since every process of a run raises it.
    """
    module_name, _, class_name = path.partition(":")
    asked = f"model.family is '{path}', which"
    # `python -m` and torchrun search the working folder; an installed script such as `rawloop` does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = _told(error, module_name)
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            reason = (
                f"there is no module {error.name} in {os.getcwd()} or among the installed packages; start from its "
                "folder, or install it"
            )
        raise UserError(f"{asked} cannot be imported: {reason}") from error
    if not hasattr(module, class_name):
        near = nearest(class_name, vars(module))
        raise UserError(f"model.family is '{path}', and {module.__file__} has no {class_name}{near}")
    try:
        family = getattr(module, class_name)(config)
    except RawloopError:
        raise
    except Exception as error:
        raise UserError(f"{asked} cannot be made from model's config: {_told(error, module_name)}") from error
    lacking = [name for name in Family.__annotations__ if not hasattr(family, name)]
    lacking += [name for name in REQUIRED if not has(family, name)]
    if lacking:
        raise UserError(f"{asked} lacks {', '.join(lacking)}: see rawloop.contracts.Family and docs/families.md")
    return cast(Family, family)


def _told(error: Exception, module_name: str) -> str:
    """Return an error in one line, with its place in the user's file, else in the file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if frame.filename.removesuffix(".py").endswith(module_name.replace(".", os.sep))]
    place = (users or frames)[-1]
    file, line = place.filename, place.lineno
    if isinstance(error, SyntaxError):  # it has no frame of the file
        file, line = error.filename or file, error.lineno
    return f"{' '.join(traceback.format_exception_only(error)[-1].split())} ({file}, line {line})"
