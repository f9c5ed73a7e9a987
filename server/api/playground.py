"""GET / and /train: the pages that show what control does and train a head. Static files of `server/playground/`, no
build step.

They are public, since a browser sends no key for them; what the page asks of the server needs its key as ever. Only
the names listed here are served, so that no request chooses a file. Enter at `router` and `PATHS`.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from starlette.responses import FileResponse

_FOLDER = Path(__file__).parents[1] / "playground"
_PAGES = {"/": "index.html", "/train": "train.html"}
_SCRIPT, _STYLE = "text/javascript; charset=utf-8", "text/css; charset=utf-8"
_ASSETS = {
    "icon.svg": "image/svg+xml",
    "theme.css": _STYLE,
    "layout.css": _STYLE,
    "results.css": _STYLE,
    "api.js": _SCRIPT,
    "chart.js": _SCRIPT,
    "dom.js": _SCRIPT,
    "form.js": _SCRIPT,
    "heads.js": _SCRIPT,
    "main.js": _SCRIPT,
    "pane.js": _SCRIPT,
    "request.js": _SCRIPT,
    "snippets.js": _SCRIPT,
    "stream.js": _SCRIPT,
    "trace.js": _SCRIPT,
    "train.js": _SCRIPT,
    "view.js": _SCRIPT,
}
PATHS = frozenset({*_PAGES, *(f"/playground/{name}" for name in _ASSETS)})
"""What the gate lets through without a key."""
_HEADERS = {
    # Nothing inline and nothing from another host; strings never become markup or script.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for again each time, and sent again only when it has changed: page and scripts never differ in age.
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
@router.get("/train")
def page(request: Request) -> Response:
    return _file(request, _PAGES[request.scope["path"]], "text/html; charset=utf-8")


@router.get("/playground/{name}")
def asset(request: Request, name: str) -> Response:
    if name not in _ASSETS:
        raise HTTPException(404)
    return _file(request, name, _ASSETS[name])


def _file(request: Request, name: str, media_type: str) -> Response:
    path = _FOLDER / name
    response = FileResponse(path, media_type=media_type, headers=_HEADERS, stat_result=path.stat())
    if request.headers.get("if-none-match") == response.headers["etag"]:
        kept = {key: response.headers[key] for key in ("etag", *map(str.lower, _HEADERS))}
        return Response(status_code=304, headers=kept)
    return response
