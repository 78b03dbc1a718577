"""The versions of the packages that a checkpoint or a capsule is written with."""

from importlib.metadata import PackageNotFoundError, version


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the packages that write a checkpoint; None if one is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in ("rawloop", "torch", "transformers", "peft", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def changed_versions(then: dict[str, str | None], now: dict[str, str | None]) -> str:
    """Return a clause that names the packages with another version than when the checkpoint was written."""
    changed = [f"{name} {then.get(name)} then, {here} now" for name, here in now.items() if then.get(name) != here]
    return f" ({'; '.join(changed)})" if changed else ""
