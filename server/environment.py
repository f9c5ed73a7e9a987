"""The RECONTROL_* variables that are no mistake: settings, what other parts read, and what Kubernetes sets by itself.

For a Service called `recontrol`, Kubernetes gives every container of its namespace variables such as
RECONTROL_PORT=tcp://10.0.0.1:8000, unless the Pod says `enableServiceLinks: false`. They are nobody's settings and are
passed over. Enter at `service_links`, `unknown_variable` and `no_such_setting`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

PREFIX = "RECONTROL_"
OTHERS = frozenset({"RECONTROL_CONFIG", "RECONTROL_KERNELS", "RECONTROL_CACHE_DIR", "RECONTROL_API_KEY"})
"""No fields of a command: the settings' file, what kernels and caches read, and the key that clients send."""
_OF_TESTS = "RECONTROL_REQUIRE_"
_LINK = re.compile(
    r"RECONTROL_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_PORT = re.compile(r"RECONTROL_(?:\w+_)?PORT")
_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://")


def service_links(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that Kubernetes, or Docker's `--link`, made of a Service."""
    return [
        name
        for name, value in environ.items()
        if _LINK.fullmatch(name) or (_PORT.fullmatch(name) and _ADDRESS.match(value))
    ]


def unknown_variable(environ: Mapping[str, str], fields: Iterable[str]) -> str | None:
    """The first RECONTROL_* variable that nothing reads; None without one.

    `fields` are the names of settings, which variables name in any case.
    """
    known = OTHERS | {f"{PREFIX}{field.upper()}" for field in fields}
    links = service_links(environ)
    for name in sorted(environ.keys() - links):
        asked = name.upper()
        if asked.startswith(PREFIX) and asked not in known and not asked.startswith(_OF_TESTS):
            return name
    return None


def no_such_variable(name: str, fields: Iterable[str]) -> str:
    """What to say of an unknown one, with the nearest that there is."""
    others = (other.removeprefix(PREFIX).lower() for other in OTHERS)
    return f"{name}: {no_such_setting(name.upper().removeprefix(PREFIX).lower(), {*fields, *others}, as_variable=True)}"


def no_such_setting(name: str, fields: Iterable[str], *, as_variable: bool = False) -> str:
    likely = difflib.get_close_matches(name, sorted(fields), n=1)
    nearest = [f"{PREFIX}{field.upper()}" if as_variable else field for field in likely]
    return "; ".join(["there is no such setting", *(f"did you mean {field}?" for field in nearest)])
