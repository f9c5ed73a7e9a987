"""Who may ask for what: every path but a few public ones needs a key, and what is the operator's, which is management
and metrics, needs a key of its own.

The path is the one that routes see, `scope["path"]`; nothing here reads the Host header. With no keys configured the
server is open, but for management, which then does not exist. Enter at `Gatekeeper`.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.gate.context import context_of
from server.api.gate.keys import KeyRing
from server.api.gate.limits import Caller, Callers
from server.api.handlers import error_response
from server.errors import AuthenticationError, NotFoundError

MANAGEMENT_PREFIX = "/v1/management/"
MANAGED_POSTS = frozenset({"/v1/heads"})
"""What callers may read and operators alone may change."""
METRICS_PATH = "/metrics"
"""Where little is asked, its sums tell each caller of what another one asked."""
PUBLIC_PATHS = frozenset({"/health", "/ready"})
ANONYMOUS = "anonymous"
_NO_KEY = "This server needs a key: send the header `Authorization: Bearer <key>`."
_WRONG_KEY = "The key in the Authorization header does not open this path."
_NOT_OPERATORS_KEY = f"{_WRONG_KEY} It needs a management key."
_OPERATORS_KEY = "This path needs a management key: send the header `Authorization: Bearer <key>`."


class Gatekeeper:
    """Finds the caller. Its requests are counted behind this (`quota.py`), once they are there as a whole."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        management_keys: KeyRing,
        inspect_keys: KeyRing,
        everyone_inspects: bool,
        callers: Callers,
        public_paths: frozenset[str],
    ) -> None:
        """`keys` hold the `inspect_keys`, whose callers may see more."""
        self._app = app
        self._inspect_keys = inspect_keys
        self._everyone_inspects = everyone_inspects
        self._keys = keys
        self._management_keys = management_keys
        self._callers = callers
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._public_paths:
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        try:
            context.caller = self._caller(scope)
            # The patterns of routes end in `$`, which stands before a last line end too: they would take `/metrics\n`
            # for the path that was not seen here.
            if scope["path"].endswith("\n"):
                raise NotFoundError("No path of this server ends in a line end.")
        except (AuthenticationError, NotFoundError) as error:
            await error_response(error, context.request_id)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        """None where nothing is limited. Raises AuthenticationError."""
        context = context_of(scope)
        is_change = scope["method"] == "POST" and scope["path"] in MANAGED_POSTS
        context.is_manager = is_change or scope["path"].startswith(MANAGEMENT_PREFIX)
        is_operators = context.is_manager or scope["path"] == METRICS_PATH
        key_id = self._key_id(scope, self._management_keys if is_operators else self._keys)
        context.may_inspect = self._everyone_inspects or key_id in self._inspect_keys
        context.facts["key"] = key_id
        if context.is_manager or scope["method"] != "POST":
            return None
        return self._callers.get(key_id)

    def _key_id(self, scope: Scope, ring: KeyRing) -> str:
        if not ring and not self._keys:
            return ANONYMOUS
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            raise AuthenticationError(_NO_KEY if ring is self._keys else _OPERATORS_KEY)
        scheme, _, presented = given[0].partition(b" ")
        key_id = ring.find(presented.strip(b" ")) if scheme.lower() == b"bearer" and len(given) == 1 else None
        if key_id is None:
            raise AuthenticationError(_WRONG_KEY if ring is self._keys else _NOT_OPERATORS_KEY)
        return key_id
