"""Which cloud a command talks to."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from g4kit.cloud.base import Cloud
from g4kit.errors import UserError
from g4kit.output import say

LOCAL_ROOT = ".g4kit"


def open_cloud(target: str | None, environ: Mapping[str, str] = os.environ) -> Cloud:
    """The target's cloud, said on stderr. target: as given by --target or G4KIT_TARGET, else the default."""
    name = target or default_target()
    if name not in TARGETS:
        raise UserError(f"target: got {name!r}; write {' or '.join(TARGETS)}.")
    cloud = TARGETS[name](environ)
    say(f"target: {name} ({cloud.bucket.url})")
    return cloud


def default_target() -> str:
    """A configured deployment is what makes another target the default; without one it is this machine."""
    return "local"


def open_local(environ: Mapping[str, str]) -> Cloud:
    from g4kit.cloud.local import LocalCloud, trainer_command

    root = Path(environ.get("G4KIT_ROOT") or LOCAL_ROOT)
    return LocalCloud(root.expanduser(), command=trainer_command(environ))


TARGETS: Mapping[str, Callable[[Mapping[str, str]], Cloud]] = {"local": open_local}
