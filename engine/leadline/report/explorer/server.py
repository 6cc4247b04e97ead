"""The explorer's server: who may ask, which answer belongs to which address, and how it is started and ended.

Nothing of the run is executed or made part of a page: answers are JSON, images and files, and the page shows what they
hold as text. It asks no other server, so it works without a network.
"""

import hmac
import ipaddress
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leadline.errors import LeadlineError
from leadline.query import Run
from leadline.report.explorer.data import Asked, Explorer, Neighbours, OnePoint, Page, Selection, Sorted, Statement
from leadline.report.explorer.images import SIDES

STATIC = Path(__file__).with_name("static")
# Vega's expressions are walked, not compiled (vega-embed's `ast`), so that no script needs 'unsafe-eval'.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
CACHED = {"Cache-Control": "private, max-age=86400"}
LONGEST = 100_000  # bytes of a typed statement
SHORTEST = 8  # characters of a token
TYPES = {".csv": "text/csv; charset=utf-8", ".parquet": "application/vnd.apache.parquet"}
A = TypeVar("A", bound=Asked)


class Guard:
    """Refuses requests that the user's own page has not made, and gives every answer its headers.

    token: what a request must bring, in a cookie that the address with `?token=` sets; None where none is asked for.
    hosts: names that the Host header may have, against pages elsewhere whose name is made to point to this machine;
    None where the token guards against them.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: frozenset[str] | None) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await (self._answer(Request(scope)) or self._app)(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """What the request gets instead of what it asks for; None where it may have that."""
        host = request.headers.get("host", "")
        if self._hosts is not None and urlsplit(f"//{host}").hostname not in self._hosts:
            return PlainTextResponse(f"Host {host!r} is not this server; open the address that it printed", 403)
        if self._token is not None:
            cookie = f"leadline-{request.url.port or 80}"  # browsers send cookies to all ports of a host
            if request.url.path == "/" and self._is_token(request.query_params.get("token", "")):
                answer = RedirectResponse("/", 303)
                answer.set_cookie(cookie, self._token, httponly=True, samesite="strict")
                return answer
            if not self._is_token(request.cookies.get(cookie, "")):
                return PlainTextResponse("Not allowed: open the address with ?token= that the server printed", 403)
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                return PlainTextResponse(f"Not allowed from {origin!r}: ask from the explorer's own page", 403)
        return None

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())


def explorer_app(run: Run, token: str | None = None, hosts: frozenset[str] | None = None) -> Starlette:
    """The application; token and hosts: of Guard. Raises LeadlineError as Explorer does."""
    explorer = Explorer(run)
    vega = _bundle()
    data = explorer.about["data"]

    def index(_: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    def script(_: Request) -> Response:
        return Response(vega.result(), media_type="text/javascript", headers=CACHED)

    def about(_: Request) -> Response:
        return JSONResponse(explorer.about)

    def images(_: Request) -> Response:
        explorer.images.refuse_missing()
        return JSONResponse(True)

    def image(request: Request) -> Response:
        point_id, size = request.path_params["point_id"], request.path_params["size"]
        # Another run may be served at this address tomorrow: what browsers keep is named by the data.
        if request.path_params["data"] != data or size not in SIDES or point_id >= explorer.about["points"]:
            raise HTTPException(404, "no such image")
        return Response(explorer.images.png(point_id, size), media_type="image/png", headers=CACHED)

    def plane(request: Request) -> Response:
        return JSONResponse(explorer.plane(_asked(Selection, request.query_params)))

    def points(request: Request) -> Response:
        return JSONResponse(explorer.points(_asked(Page, request.query_params)))

    def point(request: Request) -> Response:
        point_id, asked = request.path_params["point_id"], _asked(OnePoint, request.query_params)
        if point_id >= explorer.about["points"]:
            raise HTTPException(404, f"point: {point_id} is not in the run")
        return JSONResponse(explorer.point(point_id, asked.architecture))

    def neighbours(request: Request) -> Response:
        return JSONResponse(explorer.neighbours(_asked(Neighbours, request.query_params)))

    def download(request: Request) -> Response:
        asked, ending = _asked(Sorted, request.query_params), f".{request.path_params['ending']}"
        if ending not in TYPES:
            raise HTTPException(404, "download: csv or parquet")
        # Made whole before it is sent: one that fails is an error, not half a file.
        folder = tempfile.TemporaryDirectory(prefix="leadline-")
        path = Path(folder.name) / f"selection{ending}"
        try:
            explorer.download(asked, path)
        except BaseException:
            folder.cleanup()
            raise
        name = f"{explorer.about['name']}-selection{ending}"
        return FileResponse(path, media_type=TYPES[ending], filename=name, background=BackgroundTask(folder.cleanup))

    async def sql(request: Request) -> Response:
        if int(request.headers.get("content-length", LONGEST + 1)) > LONGEST:
            raise HTTPException(413, f"query: longer than {LONGEST} bytes")
        statement = _parsed(Statement.model_validate_json, await request.body())
        return JSONResponse(await run_in_threadpool(explorer.query, statement.query))

    routes = [
        Route("/", index),
        Route("/vega.js", script),
        Route("/about", about),
        Route("/images", images),
        Route("/images/{data}/{size}/{point_id:int}.png", image),
        Route("/plane", plane),
        Route("/points", points),
        Route("/points/{point_id:int}", point),
        Route("/neighbours", neighbours),
        Route("/download.{ending}", download),
        Route("/sql", sql, methods=["POST"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    app = Starlette(routes=routes, exception_handlers={LeadlineError: _refused})
    app.add_middleware(Guard, token=token, hosts=hosts)
    return app


def serve(run: Run, host: str, port: int, token: str | None, tell: Callable[[str], None]) -> None:
    """Serve until the process is interrupted; `tell` is given the address when it can be opened.

    port: 0 for any that is free. token: by default none on this machine's own addresses, on others a new one.
    Raises LeadlineError as Explorer does, for an address that cannot be had, and for a token that is easily guessed.
    """
    if token is not None and len(token) < SHORTEST:
        raise LeadlineError(f"--token: shorter than {SHORTEST} characters; give a longer one, or leave it to Leadline")
    is_own = _is_loopback(host)
    if token is None and not is_own:
        token = secrets.token_urlsafe(24)
    app = explorer_app(run, token, frozenset({host, "localhost", "127.0.0.1", "::1"}) if is_own else None)
    try:
        opened = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise LeadlineError(f"{host}:{port}: not to be had ({error.strerror}); give other --host or --port") from None
    with opened:
        shown = f"[{host}]" if ":" in host else host
        tell(f"http://{shown}:{opened.getsockname()[1]}/{f'?token={token}' if token else ''}")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False))
        with suppress(KeyboardInterrupt):  # how it is ended
            server.run(sockets=[opened])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bundle() -> "Future[bytes]":
    """Vega, Vega-Lite and Vega-Embed in one script, as altair's own pages have it: the page needs no network.

    Making it takes seconds in which Python stands still, so another process does it.
    """
    bundle = "vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')"
    make = f"import sys, vl_convert; sys.stdout.buffer.write({bundle}.encode())"
    command = [sys.executable, "-c", make]
    pool = ThreadPoolExecutor(1)
    made = pool.submit(lambda: subprocess.run(command, capture_output=True, check=True, start_new_session=True).stdout)
    pool.shutdown(wait=False)
    return made


def _asked(kind: type[A], given: Any) -> A:
    """What a request's parameters ask for. Raises LeadlineError that names the first that is wrong."""
    return _parsed(kind.model_validate, dict(given))


def _parsed(parse: Callable[[Any], A], given: Any) -> A:
    try:
        return parse(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "request"
        raise LeadlineError(f"{name}: {first['msg']}") from None


def _refused(_: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 400)
