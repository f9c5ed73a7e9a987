"""Follows a heads' folder while the server runs: what is new or changed there is loaded, on every replica that looks.

Cards are compared with those on offer, so a replica that starts late or misses a look ends up like the others. What
cannot be loaded, such as a head that is half written, is told once, tried again, and leaves the old one in its place. A
head that is gone from the folder stays, and one that a manager unloaded stays unloaded. Enter at `HeadWatch.run`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from server.engines.base import Engine
from server.errors import RecontrolError
from server.telemetry import Telemetry
from value_models.errors import HeadFileError
from value_models.head_folder import HeadFolder, open_heads

_log = logging.getLogger(__name__)


class HeadWatch:
    def __init__(self, engine: Engine, telemetry: Telemetry, location: str, interval_s: float) -> None:
        self._engine = engine
        self._telemetry = telemetry
        self._location = location
        self._interval_s = interval_s
        self._seen: set[str] = set()
        """Heads that were on offer once."""
        self._told: dict[str, str] = {}
        """The last problem that was logged, by the head's name, or "" for the folder."""

    async def run(self) -> None:
        """Look, again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.look()
            except Exception:
                _log.exception("The heads' folder could not be looked at")

    async def look(self) -> list[str]:
        """Load what is new or changed; its names."""
        self._seen |= self._engine.info.heads.keys()
        try:
            folder, names = await asyncio.to_thread(self._list)
        except HeadFileError as error:
            self._tell("", str(error))
            return []
        self._told.pop("", None)
        return [name for name in names if await self._follow(folder, name)]

    def _list(self) -> tuple[HeadFolder, list[str]]:
        folder = open_heads(self._location)
        return folder, folder.names()

    async def _follow(self, folder: HeadFolder, name: str) -> bool:
        offered = self._engine.info.heads.get(name)
        if offered is None and name in self._seen:
            return False
        try:
            card = await asyncio.to_thread(folder.card, name)
            if offered is not None and _text(offered) == _text(card.model_dump(mode="json")):
                self._told.pop(name, None)
                return False
            await self._engine.load_head(name)
        except (HeadFileError, RecontrolError) as error:
            self._tell(name, str(error))
            return False
        except Exception as error:
            # Whatever one head does, the others are followed.
            self._tell(name, f"{type(error).__name__}: {error}")
            return False
        self._telemetry.bind_heads(self._engine.info.heads)
        self._told.pop(name, None)
        self._seen.add(name)
        _log.info("The value head %r was read anew from %s", name, self._location)
        return True

    def _tell(self, name: str, problem: str) -> None:
        if self._told.get(name) != problem:
            self._told[name] = problem
            _log.warning("The heads' folder is not followed%s: %s", f" for {name!r}" if name else "", problem)


def _text(card: Any) -> str:
    """Cards hold figures, and one that is no number does not equal itself."""
    return json.dumps(card, sort_keys=True)
