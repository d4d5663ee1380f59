"""The web server: pages for annotators and the administrator, and the small API that they call.

  GET  /enter/KEY                a personal link: sets the session's cookie
  GET  /                         the page on which one annotates
  GET  /api/next                 the item on the screen, or a new one
  GET  /api/item/ID              an item that one has answered
  PUT  /api/item/ID/draft        keeps a draft, and the lease
  POST /api/item/ID/answer|skip  ends an item; the reply holds the next one
  GET  /picture/ID/N             a picture of such an item
  GET  /guidelines               what to mark
  GET  /admin, /admin/item/ID    the administrator's pages
  GET  /admin/picture/ID/N       a picture of any item
  POST /api/admin/ACTION         pause, resume, invite, renew, revoke, admit, another

Everything that changes something needs the header X-Token, which other sites cannot send. An annotator sees the items that
were given to them and no others.
"""

import collections
import contextlib
import functools
import hmac
import ipaddress
import json
import pathlib
import socket
import sqlite3
import time
from collections.abc import Callable, Mapping

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from richhf_data import command, drawing, jsonl, keywords, schema, web
from richhf_data.annotate import kinds, overview
from richhf_data.annotate.store import Annotator, Refused, Store
from richhf_data.errors import UserError

MAX_BODY = 256 * 1024  # bytes
RATE, BURST = 30, 200  # requests a second of one annotator, and how many at once
HOST_RATE, HOST_BURST = 50, 400  # of one address, which a whole team may share before it has signed in
_FOLDER = pathlib.Path(__file__).parent
_HEADERS = web.HEADERS | {
    "content-security-policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}


class Rate:
    """Bounds how many requests a client sends: `burst` at once, `rate` a second."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock, self._left = rate, burst, clock, collections.OrderedDict()

    def wait(self, client: str) -> float:
        """Seconds until the client may send this request; 0 if now."""
        now = self._clock()
        left, then = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        self._left[client] = (left - 1 if left >= 1 else left, now)
        while len(self._left) > 10_000:
            self._left.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) / self._rate


def app(store: Store, accounts: bool, url: str = "", hosts: tuple[str, ...] = ()) -> Starlette:
    """The application.

    Args:
      accounts: annotators come by their links. If not, everybody who reaches the server is the one annotator "local", who
        is the administrator too.
      url: where people find the server, for their links; "" takes what they asked for. With https, the cookie is sent over
        https alone. hosts: the names that a request may give as its Host, without accounts.
    """
    site = _Site(store, accounts, url.rstrip("/"), hosts)
    register_url_convertor("id", _Id())
    get, post, put = ({"methods": [name]} for name in ("GET", "POST", "PUT"))
    routes = [
        Route("/", site.page, **get),
        Route("/enter/{key}", site.enter, **get),
        Route("/guidelines", site.guidelines, **get),
        Route("/api/next", site.next, **get),
        Route("/api/item/{item:id}", site.item, **get),
        Route("/api/item/{item:id}/draft", site.draft, **put),
        Route("/api/item/{item:id}/{action}", site.end, **post),
        Route("/picture/{item:id}/{number:id}", site.picture, **get),
        Route("/admin", site.admin, **get),
        Route("/admin/item/{item:id}", site.admin_item, **get),
        Route("/admin/picture/{item:id}/{number:id}", site.original, **get),
        Route("/api/admin/{action}", site.act, **post),
        Mount("/static", StaticFiles(directory=_FOLDER / "static")),
    ]
    handlers = {Refused: _refused, UserError: _wrong, sqlite3.OperationalError: _database, Exception: _fault}
    application = Starlette(routes=routes, exception_handlers=handlers)
    application.add_middleware(_Guard, site=site)
    application.state.site = site
    return application


class _Id(IntegerConvertor):
    """A number of a row in a path; longer ones are of no page."""

    regex = "[0-9]{1,9}"


def cookie_name(store: Store) -> str:
    """The name of the session's cookie: cookies are of a host, on which each project has its own."""
    return f"rahf_{store.mac('cookie')[:6].hex()}"


class _Site:
    def __init__(self, store: Store, accounts: bool, url: str, hosts: tuple[str, ...]):
        self.store, self.accounts, self.url, self.hosts = store, accounts, url, hosts
        self.cookie = cookie_name(store)
        self.of_address, self.of_annotator = Rate(HOST_RATE, HOST_BURST), Rate(RATE, BURST)
        self._local = None if accounts else store.invite("local", administrator=True)
        self.templates = drawing.templates(_FOLDER)

    # ---- Who asks ---------------------------------------------------------------------------------------------------
    def visitor(self, cookies: Mapping[str, str]) -> tuple[str, Annotator | None]:
        """The key of a request's cookie, and whose it is; without accounts those of "local"."""
        key = cookies.get(self.cookie, "") if self.accounts else self.store.key(self._local)
        return key, self.store.enter(key)

    def _token(self, key: str) -> str:
        return self.store.mac(f"token {key}").hex()

    def _who(self, request: Request, changes: bool = False, administrator: bool = False) -> Annotator:
        """The annotator of a request, as `_Guard` found them. Raises Refused without one, or without the right."""
        key, who = request.state.visitor
        if who is None:
            raise Refused(401, "You are not signed in, or your link has ended. Open your personal link again.")
        if administrator and not who.administrator:
            raise Refused(403, "This page is for the administrator.")
        if changes and not hmac.compare_digest(request.headers.get("x-token", "").encode(), self._token(key).encode()):
            raise Refused(403, "This page is out of date. Reload it.")
        return who

    # ---- Pages ------------------------------------------------------------------------------------------------------
    def html(self, name: str, **values) -> HTMLResponse:
        return HTMLResponse(self.templates.get_template(name).render(**values))

    async def enter(self, request: Request) -> Response:
        who = await run_in_threadpool(self.store.enter, request.path_params["key"])
        if who is None:
            raise Refused(401, "This link has ended. Ask for a new one.")
        response = self.html("enter.html.jinja", who=who, settings=self.store.settings)
        secure = self.url.startswith("https")
        options = {"httponly": True, "samesite": "strict", "secure": secure, "max_age": 90 * 86400}
        response.set_cookie(self.cookie, request.path_params["key"], **options)
        return response

    async def page(self, request: Request) -> Response:
        who, settings = self._who(request), self.store.settings
        setup = {
            "kind": settings.kind,
            "questions": settings.questions,
            "question": settings.question,
            "token": self._token(request.state.visitor[0]),
            "draft_name": f"{self._token('project')[:12]}-{who.id}",
            "radius": schema.POINT_RADIUS,
            "sides": list(schema.SIDES),
            "skips": kinds.SKIPS,
            "beat": min(60.0, settings.lease_seconds / 3),
        }
        return self.html("annotate.html.jinja", who=who, settings=settings, setup=setup, heatmaps=schema.HEATMAPS)

    async def guidelines(self, request: Request) -> Response:
        self._who(request)
        return self.html("guidelines.html.jinja", settings=self.store.settings)

    async def admin(self, request: Request) -> Response:
        self._who(request, administrator=True)
        found = await run_in_threadpool(overview.overview, self.store)
        links = {row["id"]: self.store.key(row["id"]) for row in self.store.annotators()} if self.accounts else {}
        token = self._token(request.state.visitor[0])
        base, start = self.url or str(request.base_url).rstrip("/"), request.query_params.get("from", "")
        start = int(start) if start.isascii() and start.isdecimal() and len(start) < 10 else 0
        values = {
            "found": found,
            "links": links,
            "token": token,
            "base": base,
            "settings": self.store.settings,
            "start": start,
        }
        return self.html("admin.html.jinja", **values)

    async def admin_item(self, request: Request) -> Response:
        self._who(request, administrator=True)
        number = request.path_params["item"]
        item = await run_in_threadpool(self.store.one, number)
        work = [row for row in await run_in_threadpool(self.store.work, number) if row["state"] != "leased"]
        answers = [dict(row) | {"answer": json.loads(row["answer"] or "null")} for row in work]
        points = [
            {"x": 100 * x, "y": 100 * y, "kind": kind, "name": row["name"]}
            for row in answers
            for kind, marks in ((row["answer"] or {}).get("points") or {}).items()
            for x, y in marks
        ]
        values = {"item": item, "work": answers, "points": points, "tokens": keywords.tokenize(item["prompt"])}
        values |= {"pictures": range(len(json.loads(item["pictures"]))), "scores": schema.SCORES}
        return self.html(
            "admin_item.html.jinja",
            token=self._token(request.state.visitor[0]),
            radius=100 * schema.POINT_RADIUS,
            settings=self.store.settings,
            **values,
        )

    # ---- Items ------------------------------------------------------------------------------------------------------
    def _shown(self, row, who: Annotator) -> dict:
        """What the browser may know of an item: not whether it is gold, and not which set a picture is of."""
        pictures = json.loads(row["pictures"])
        return self._progress(who) | {
            "item": row["id"],
            "prompt": row["prompt"],
            "pieces": keywords.pieces(row["prompt"]),
            "pictures": [f"/picture/{row['id']}/{number}" for number in range(len(pictures))],
            "state": row["state"],
            "draft": json.loads(row["draft"] or "null"),
            "answer": json.loads(row["answer"] or "null"),
            "reason": row["reason"],
            "revision": row["revision"],
            "suggestion": json.loads(row["suggestion"] or "null") if row["suggested"] else None,
        }

    def _progress(self, who: Annotator) -> dict:
        count, answered = self.store.answered(who)
        return {"count": count, "answered": answered, "left": self.store.left(who)}

    def _next(self, who: Annotator) -> dict:
        try:
            row = self.store.next_item(who)
        except Refused as error:
            return self._progress(who) | {"item": None, "message": str(error)}
        if row is not None:
            return self._shown(row, who)
        message = "You have seen all pictures that are open. Thank you! New ones appear here when there are any."
        return self._progress(who) | {"item": None, "message": message}

    async def next(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._next, self._who(request)))

    async def item(self, request: Request) -> Response:
        who = self._who(request)
        row = await run_in_threadpool(self.store.item, request.path_params["item"], who)
        return JSONResponse(await run_in_threadpool(self._shown, row, who))

    async def draft(self, request: Request) -> Response:
        who, body = self._who(request, changes=True), await _body(request)
        revision = _revision(body)
        held = await run_in_threadpool(self.store.draft, request.path_params["item"], who, body.get("draft"), revision)
        return JSONResponse({"held": held})

    async def end(self, request: Request) -> Response:
        who, body = self._who(request, changes=True), await _body(request)
        item, action = request.path_params["item"], request.path_params["action"]
        revision, seconds = _revision(body), body.get("seconds", 0)
        if seconds not in kinds.SECONDS:
            raise UserError(f"seconds: got {seconds!r:.40}, expected {kinds.SECONDS}")
        if action == "answer":
            ended = functools.partial(self.store.answer, item, who, body.get("answer"))
        elif action == "skip" and isinstance(body.get("reason"), str):
            ended = functools.partial(self.store.skip, item, who, body["reason"])
        else:
            raise Refused(404, "There is no such page.")
        state, revision = await run_in_threadpool(ended, revision, float(seconds))
        return JSONResponse({"state": state, "revision": revision, "next": await run_in_threadpool(self._next, who)})

    async def picture(self, request: Request) -> Response:
        who = self._who(request)
        number = request.path_params["number"]
        return self._sent(await run_in_threadpool(self.store.picture, request.path_params["item"], number, who))

    async def original(self, request: Request) -> Response:
        self._who(request, administrator=True)
        number = request.path_params["number"]
        return self._sent(await run_in_threadpool(self.store.original, request.path_params["item"], number))

    def _sent(self, file: pathlib.Path) -> Response:
        if not file.is_file():
            raise Refused(404, "The picture's file is gone.")
        return FileResponse(file, headers={"cache-control": "private, max-age=3600"})

    # ---- The administrator's actions --------------------------------------------------------------------------------
    async def act(self, request: Request) -> Response:
        self._who(request, changes=True, administrator=True)
        body, action, store = await _body(request), request.path_params["action"], self.store
        number, name = body.get("id"), body.get("name")
        if action in ("pause", "resume"):
            await run_in_threadpool(store.pause, action == "pause")
        elif action == "invite" and isinstance(name, str) and jsonl.is_text(name) and self.accounts:
            await run_in_threadpool(store.invite, name)
        elif action in ("renew", "revoke", "admit", "another") and type(number) is int and 0 < number < 2**31:
            call = store.another_opinion if action == "another" else getattr(store, action)
            await run_in_threadpool(call, number)
        else:
            raise Refused(404, "There is no such action.")
        return JSONResponse({"done": True})


def _revision(body: dict) -> int:
    revision = body.get("revision", 0)
    if type(revision) is not int or not 0 <= revision < 2**31:
        raise UserError(f"revision: got {revision!r:.40}, expected a whole number, 0 or more")
    return revision


async def _body(request: Request) -> dict:
    """The JSON object of a request. Raises Refused for another type, and for more than `MAX_BODY` bytes."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refused(415, "Expected application/json.")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise Refused(413, f"The request has more than {MAX_BODY:,} bytes.")
    return jsonl.parse(data, "a JSON object", "request")


class _Guard:
    """Adds the security headers, bounds the rate, and refuses foreign hosts where there are no accounts."""

    def __init__(self, app, site: _Site):
        self.app, self.site = app, site

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)

        key, who = await run_in_threadpool(self.site.visitor, request.cookies)
        request.state.visitor = key, who
        address = request.client.host if request.client else ""
        wait = self.site.of_annotator.wait(who.name) if who else self.site.of_address.wait(address)
        if wait:
            response = _said(429, "Too many requests at once. Wait a moment.", {"retry-after": str(int(wait) + 1)})
        elif not self.site.accounts and request.url.hostname not in self.site.hosts:
            response = _said(421, "This server is for its own machine alone.")
        else:
            response = self.app
        await response(scope, receive, web.with_headers(send, _HEADERS))


def _said(status: int, message: str, headers: dict | None = None) -> JSONResponse:
    return JSONResponse({"error": command.printable(message)}, status, headers)


def _fault(request: Request, error: Exception) -> Response:
    return _said(500, "A fault of the server; its log has the reason. Your work is kept in this browser.")


def _is_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _refused(request: Request, error: Refused) -> Response:
    if _is_page(request):
        page = request.app.state.site.html("said.html.jinja", message=str(error))
        page.status_code = error.status
        return page
    return _said(error.status, str(error))


def _wrong(request: Request, error: UserError) -> Response:
    return _said(422, str(error))


def _database(request: Request, error: sqlite3.OperationalError) -> Response:
    full = "full" in str(error) or "disk I/O" in str(error)
    message = "The server's disk is full; your work is kept in this browser." if full else f"The database: {error}."
    return _said(507 if full else 503, message)


# ---- Running --------------------------------------------------------------------------------------------------------
def listen(host: str, port: int, accounts: bool) -> socket.socket:
    """A socket that is bound.

    Raises:
      UserError: the port is in use; a public address without accounts.
    """
    if not accounts and not is_loopback(host):
        raise UserError(
            f"host: got {host}, which others can reach, and no annotators; expected 127.0.0.1, or --annotators=NAME,..., "
            "who get personal links"
        )
    return web.bind(host, port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
