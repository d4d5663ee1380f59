"""What the service answers.

  GET  /              a page: drop a picture, type a prompt, see the feedback
  POST /v1/feedback   {"images": [base64], "prompts": [text], "heatmaps": "png"|"float16"|null, "rewards": [name]|null},
                      or a form with files `images` and fields of the same names
  POST /score         UniRL's protocol; GET /rewards lists the names
  POST /, /pickle     flow_grpo's and verl-omni's protocol, if `accept_pickle`
  GET  /health        200 while it works
  GET  /metrics       Prometheus' text format

A bad picture or prompt is an error of its own in the answer, and the others of its request are scored. Of a pickled request,
whose answer has no place for such an error, it fails the request. Too many requests at once get 429 and Retry-After.
"""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import json
import pickle
import time
import traceback
from collections.abc import Mapping, Sequence

import numpy as np
import prometheus_client
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from rahf import report
from rahf.serve import plain_pickle, scoring
from rahf.serve.batches import Batches
from rahf.serve.decoding import Decoders, Picture
from rahf.serve.scoring import Row, Scorer
from richhf_data import command, images, jsonl, keywords, schema, web
from richhf_data.errors import UserError

_CHUNK = 8  # pictures of a request that are decoded together
_REWARD_SIDE = 2048  # pixels: rewards get a larger picture scaled down to this longer side
_PROMPT = 20_000  # characters
_PARTS = 200_000  # commas and brackets of a JSON text, which would be slow to read
_FORMATS = ("png", "float16")
_FAULT = "a fault of the service; its log has the reason"
_GONE = 499  # the status that is counted where the client has gone
_NO_PROMPT = {"plausibility", "aesthetics"}  # what says something of a picture without its prompt
_HEADERS = web.HEADERS | {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the service takes.

    Attributes:
      pictures: of one request. waiting: pictures of all requests at once. mib: of one request's body; all bodies together
        may have four times as many. seconds: in which a body must have come. wait: seconds that a picture waits for others
        to fill its batch.
    """

    pictures: int = 256
    waiting: int = 2048
    mib: float = 64
    seconds: float = 60
    wait: float = 0.005


class Refused(Exception):
    """A request that is not computed. `status`: of HTTP. `headers`: of the answer."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers


def app(
    scorer: Scorer, decoders: Decoders, answer: Mapping[str, float], accept_pickle: bool, limits: Limits = Limits()
) -> Starlette:
    """The application.

    Args:
      answer: name -> weight, the sum that a pickled request gets. accept_pickle: whether such requests are read.
    """
    service = _Service(scorer, decoders, answer, accept_pickle, limits)
    routes = [
        Route("/", service.page, methods=["GET"]),
        Route("/", service.page_of_picture, methods=["POST"]),
        Route("/v1/feedback", service.feedback, methods=["POST"]),
        Route("/score", service.score, methods=["POST"]),
        Route("/rewards", service.rewards, methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.metrics, methods=["GET"]),
        Route("/pickle", service.pickled, methods=["POST"]),
    ]
    handlers = {Refused: _refused, UserError: _wrong, HTTPException: _http, ClientDisconnect: _gone, Exception: _fault}
    application = Starlette(routes=routes, exception_handlers=handlers, lifespan=service.running)
    application.add_middleware(_Bounds, service=service)
    return application


class _Service:
    def __init__(self, scorer: Scorer, decoders: Decoders, answer: Mapping[str, float], accept_pickle: bool, limits: Limits):
        self.scorer, self.decoders, self.limits = scorer, decoders, limits
        self.answer, self.accept_pickle = answer, accept_pickle
        self.waiting = self.bytes = 0  # of the requests that are here
        self.counts = _Counts(self)
        self.rate = 0.0  # pictures a second of the last batches

    @contextlib.asynccontextmanager
    async def running(self, application):
        """The queue, while the application runs."""
        self.batches = Batches(self.scorer, self.limits.wait, self._observe)
        self._decoded = asyncio.Semaphore(2 * self.scorer.most)  # chunks in memory: enough to fill the next batches
        yield
        await run_in_threadpool(self.batches.close)

    def _observe(self, rows: int, seconds: float) -> None:
        self.counts.batch.observe(rows)
        self.counts.device.inc(seconds)
        if seconds:
            self.rate += 0.2 * (rows / seconds - self.rate)

    # ---- Scoring ----------------------------------------------------------------------------------------------------
    async def outcomes(
        self, pictures: Sequence[bytes | str], prompts: Sequence, rewards: Sequence[Sequence[str]], keep: int | None = None
    ) -> list[dict | str]:
        """What the critic says of each picture, see `Row.future`; or the reason why it says nothing.

        Args:
          pictures: encoded pictures; a text is such a reason. rewards: the names for each. keep: see `decoding.decode`;
            adds `image` and `size`.
        """
        if not pictures:
            return []
        self._bounded(pictures)
        if self.waiting + len(pictures) > self.limits.waiting:
            seconds = 1 + int(self.waiting / max(self.rate, 1))
            raise Refused(429, f"{self.waiting:,} pictures wait; try again later", {"retry-after": str(min(seconds, 60))})
        self.waiting += len(pictures)
        try:
            whole = any(not self.scorer.rewards.keys().isdisjoint(names) for names in rewards)
            keep, size = (_REWARD_SIDE, 1) if whole else (keep, _CHUNK)  # one by one, for want of memory
            parts = (
                [values[i : i + size] for values in (pictures, prompts, rewards)] for i in range(0, len(pictures), size)
            )
            async with asyncio.TaskGroup() as group:
                chunks = [group.create_task(self._chunk(*part, keep)) for part in parts]
        finally:
            self.waiting -= len(pictures)
        found = [outcome for chunk in chunks for outcome in chunk.result()]
        failed = sum(isinstance(outcome, str) for outcome in found)
        self.counts.pictures.labels("failed").inc(failed)
        self.counts.pictures.labels("scored").inc(len(found) - failed)
        return found

    async def _chunk(self, pictures, prompts, rewards, keep) -> list[dict | str]:
        async with self._decoded:
            encoded = [data for data in pictures if not isinstance(data, str)]
            decoded = iter(await self.decoders.decode(encoded, keep) if encoded else ())
            found = [data if isinstance(data, str) else next(decoded) for data in pictures]
            rows = {}
            for i, (picture, prompt, names) in enumerate(zip(found, prompts, rewards, strict=True)):
                if isinstance(picture, Picture):
                    try:
                        if not isinstance(prompt, str) or len(prompt) > _PROMPT:
                            got = f"{len(prompt):,} characters" if isinstance(prompt, str) else f"a {type(prompt).__name__}"
                            raise UserError(f"prompt: got {got}, expected a text of at most {_PROMPT:,} characters")
                        text = self.scorer.model.text(prompt)
                    except UserError as error:
                        found[i] = str(error)
                        continue
                    rows[i] = Row({"image": picture.image, **text}, prompt, picture.kept, names, None)
            for (i, row), outcome in zip(rows.items(), await self.batches.predict([*rows.values()]), strict=True):
                if isinstance(outcome, UserError):
                    outcome = str(outcome)
                elif isinstance(outcome, Exception):
                    outcome = _FAULT
                elif keep is not None:
                    outcome |= {"image": row.picture, "size": found[i].size}
                found[i] = outcome
        return [command.printable(outcome) if isinstance(outcome, str) else outcome for outcome in found]

    # ---- Our protocol -----------------------------------------------------------------------------------------------
    async def feedback(self, request: Request) -> Response:
        kind = _kind(request)
        if kind == "multipart/form-data":
            fields = self.limits.pictures + len(self.scorer.names) + 8
            async with request.form(max_files=self.limits.pictures + 1, max_fields=fields) as form:
                pictures = [await _file(one) for one in form.getlist("images")]
                given = {"prompts": form.getlist("prompts"), "heatmaps": form.get("heatmaps")}
                given["rewards"] = form.getlist("rewards") or None
        elif kind == "application/json":
            expected = '{"images": [base64], "prompts": [text]}'
            given = await run_in_threadpool(_parsed, await request.body(), expected)
            pictures = await run_in_threadpool(_from_base64, self._bounded(_list(given, "images")))
        else:
            raise Refused(415, f"content-type: got {kind[:80]!r}, expected application/json or multipart/form-data")
        prompts, names = _list(given, "prompts"), self.scorer.names
        if given.get("rewards") is not None:
            names = _names("rewards", given["rewards"], names)
        if (heatmaps := given.get("heatmaps")) not in (None, *_FORMATS):
            raise UserError(f"heatmaps: got {heatmaps!r:.80}, expected one of {', '.join(_FORMATS)}, or none")
        if len(pictures) != len(prompts):
            raise UserError(f"prompts: got {len(prompts)} for {len(pictures)} images, expected one each")
        outcomes = await self.outcomes(pictures, prompts, [names] * len(pictures))
        results = await run_in_threadpool(lambda: [self._result(outcome, heatmaps) for outcome in outcomes])
        return _json({"model": self.scorer.model.identity, "results": results})

    def _bounded(self, pictures: list) -> list:
        """The same list. Raises Refused for too many pictures."""
        if len(pictures) > self.limits.pictures:
            raise Refused(413, f"images: got {len(pictures):,}, expected at most {self.limits.pictures} a request")
        return pictures

    def _result(self, outcome: dict | str, heatmaps: str | None) -> dict:
        """An outcome for JSON."""
        if isinstance(outcome, str):
            return {"error": outcome}
        labelled = outcome["labelled_prompt"]
        words = keywords.misaligned_words(keywords.tokenize(outcome["prompt"]), outcome["labels"])
        result = {
            "scores": outcome["scores"],
            "rewards": outcome["rewards"],
            "keywords": None if labelled is None else words,
            "labelled_prompt": labelled,
        }
        if "deviations" in outcome:
            result["deviations"] = outcome["deviations"]
        if outcome["errors"]:
            result["errors"] = outcome["errors"]
        if self.scorer.model.truncates and self.scorer.model.is_too_long(outcome["prompt"]):
            result["prompt_cut"] = True
        if heatmaps:
            result["heatmaps"] = {name: _encoded(values, heatmaps) for name, values in outcome["heatmaps"].items()}
        return result

    # ---- UniRL's protocol -------------------------------------------------------------------------------------------
    async def score(self, request: Request) -> Response:
        expected = '{"requests": [{"history": [{"text", "image_b64"}], "required_rewards": [name]}]}'
        given = await run_in_threadpool(_parsed, await request.body(), expected)
        requests = self._bounded(_list(given, "requests"))
        served, pictures, prompts, wanted = self._served(), [], [], []
        for one in requests:
            history = one.get("history") if isinstance(one, dict) else None
            last = history[-1] if isinstance(history, list) and history and isinstance(history[-1], dict) else {}
            names = _names("required_rewards", one.get("required_rewards") if isinstance(one, dict) else None, served)
            pictures.append(last.get("image_b64"))
            prompts.append(last.get("text"))
            wanted.append(names)
        pictures = await run_in_threadpool(_from_base64, pictures)
        found = await self.outcomes(pictures, prompts, wanted)
        results, errors = [], []
        for names, outcome in zip(wanted, found, strict=True):
            values = {} if isinstance(outcome, str) else self._metrics(outcome)
            why = {} if isinstance(outcome, str) else outcome["errors"]
            results.append({name: values[name] for name in names if name in values})
            errors.append({name: why.get(name, outcome) for name in names if name not in values})
        answer = {"protocol_version": "1", "results": results, "errors": errors}
        if all(isinstance(one, dict) and "request_id" in one for one in requests):  # newer clients compare them
            answer["identities"] = [{name: one.get(name) for name in _IDENTITY} for one in requests]
        return _json(answer)

    def _served(self) -> list[str]:
        """The names of all rewards: the critic, each of its scores, and the further ones."""
        has_scores = "scores" in self.scorer.model.model_config.parts
        return [*((scoring.CRITIC, *schema.SCORES) if has_scores else ()), *self.scorer.names]

    def _metrics(self, outcome: dict) -> dict[str, dict[str, float]]:
        """name -> sub-metric -> value. The critic's first sub-metric is `overall`: clients may take the first alone."""
        scores, rewards = outcome["scores"], outcome["rewards"]
        single = {name: {name: value} for name, value in (scores | rewards).items()}
        return {scoring.CRITIC: {name: scores[name] for name in sorted(scores, key="overall".__ne__)}} | single

    async def rewards(self, request: Request) -> Response:
        return _json({"rewards": self._served()})

    # ---- flow_grpo's and verl-omni's protocol -----------------------------------------------------------------------
    async def pickled(self, request: Request) -> Response:
        try:
            if not self.accept_pickle:
                raise Refused(403, "pickle: this service does not read pickles; start it with --accept_pickle")
            given = await run_in_threadpool(plain_pickle.loads, await request.body())
            if not isinstance(given, dict):
                raise UserError("pickle: expected a dictionary with images")
            pictures, prompts = given.get("images"), given.get("prompts")
            if not isinstance(pictures, list) or not all(isinstance(data, bytes) for data in pictures):
                raise UserError(f"images: got a {type(pictures).__name__}, expected a list of encoded pictures, as bytes")
            if isinstance(prompts, np.ndarray) and prompts.shape == (len(pictures),):
                prompts = prompts.tolist()
            if prompts is None and not self.answer.keys() <= _NO_PROMPT:
                needs = ", ".join(self.answer)
                raise UserError(f"prompts: got none, and {needs} needs them; or start with --answer=plausibility")
            prompts = [""] * len(pictures) if prompts is None else prompts
            if not isinstance(prompts, list | tuple) or len(prompts) != len(pictures):
                raise UserError("prompts: expected one for each of the images")
            names = [name for name in self.answer if name in self.scorer.names]
            values = []
            for i, outcome in enumerate(await self.outcomes(pictures, prompts, [names] * len(pictures))):
                terms = {} if isinstance(outcome, str) else outcome["scores"] | outcome["rewards"]
                if missing := [name for name in self.answer if name not in terms]:
                    reason = outcome if isinstance(outcome, str) else outcome["errors"][missing[0]]
                    raise UserError(f"images[{i}]: {reason}")
                values.append(sum(weight * terms[name] for name, weight in self.answer.items()))
            return _as_pickle({"scores": values, "outputs": values})
        except UserError as error:
            return _as_pickle({"error": command.printable(str(error))}, 400)
        except Refused as error:
            return _as_pickle({"error": str(error)}, error.status, error.headers)
        except Exception as error:  # a client expects a pickle of every answer
            traceback.print_exception(error)
            return _as_pickle({"error": _FAULT}, 500)

    # ---- Pages ------------------------------------------------------------------------------------------------------
    def _html(self, prompt: str = "", items: Sequence[dict] = (), error: str = "", status: int = 200) -> Response:
        names = {"title": "RAHF: rich feedback", "tables": ()}
        page = report.render("service.html.jinja", items=items, prompt=prompt, error=error, **names)
        return HTMLResponse(page, status)

    async def page(self, request: Request) -> Response:
        return self._html()

    async def page_of_picture(self, request: Request) -> Response:
        """The page with the feedback of a form's picture; a request without a form is a pickled one."""
        if _kind(request) != "multipart/form-data":
            return await self.pickled(request)
        prompt = ""
        try:
            async with request.form(max_files=2, max_fields=4) as form:
                data, prompt = await _file(form.get("picture")), form.get("prompt", "")
            if not isinstance(prompt, str) or not data:
                return self._html(error="Choose a picture and type its prompt.", status=422)
            (outcome,) = await self.outcomes([data], [prompt], [self.scorer.names], keep=report.INLINED_SIDE)
        except Refused as error:
            return self._html(prompt, error=str(error), status=error.status)
        if isinstance(outcome, str):
            return self._html(prompt, error=outcome, status=422)
        view = await run_in_threadpool(report.view, 0, outcome)
        view["rewards"] = outcome["rewards"]
        return self._html(prompt, [view], "; ".join(f"{name}: {why}" for name, why in outcome["errors"].items()))

    # ---- Operation --------------------------------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        works = self.batches.alive
        answer = {"status": "ok" if works else "the thread of the batches has ended", "model": self.scorer.model.identity}
        answer["rewards"] = {name: ["alive" if works else "dead"] for name in self._served()}
        return _json(answer | {"waiting": self.waiting}, 200 if works else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(prometheus_client.generate_latest(self.counts.registry), media_type="text/plain; version=0.0.4")


class _Counts:
    """The metrics, in a registry of their own."""

    def __init__(self, service: _Service):
        self.registry = prometheus_client.CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = prometheus_client.Counter("rahf_requests", "Requests.", ["path", "status"], **own)
        self.seconds = prometheus_client.Histogram("rahf_request_seconds", "From request to answer.", ["path"], **own)
        self.pictures = prometheus_client.Counter("rahf_pictures", "Pictures.", ["outcome"], **own)
        sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
        self.batch = prometheus_client.Histogram("rahf_batch_pictures", "Pictures of a batch.", buckets=sizes, **own)
        self.device = prometheus_client.Counter(
            "rahf_batch_seconds", "From a batch's start to its end; batches overlap.", **own
        )
        waiting = prometheus_client.Gauge("rahf_waiting_pictures", "Pictures of the requests that are here.", **own)
        waiting.set_function(lambda: service.waiting)


class _Bounds:
    """Bounds the bodies of requests, ends those whose client has gone, adds the security headers, and counts."""

    def __init__(self, app, service: _Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, limits, got, start = self.service, self.service.limits, 0, time.monotonic()
        most, status, watcher = int(limits.mib * 2**20), _GONE, None
        headers = Headers(scope=scope)
        close = {"connection": "close"}  # the rest of the body is not read

        async def bounded():
            nonlocal got, watcher
            if headers.get("content-encoding", "identity") != "identity":
                raise Refused(415, "content-encoding: expected a body that is not compressed.", close)
            if int(headers.get("content-length", "0")) > most:
                raise Refused(413, too_large, close)
            try:
                message = await asyncio.wait_for(receive(), max(0.001, start + limits.seconds - time.monotonic()))
            except TimeoutError:
                raise Refused(408, f"The body took more than {limits.seconds:g} seconds.", close) from None
            size = len(message.get("body", b""))
            got, service.bytes = got + size, service.bytes + size
            if got > most:
                raise Refused(413, too_large, close)
            if service.bytes > 4 * most:
                raise Refused(429, "Too many large requests at once; try again later.", {"retry-after": "1"} | close)
            if message["type"] == "http.request" and not message.get("more_body"):
                watcher = asyncio.create_task(end_without_client())
            return message

        async def end_without_client():
            while (await receive())["type"] != "http.disconnect":
                pass
            answered.cancel()

        async def counted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        too_large = f"The body has more than {limits.mib:g} MiB; send fewer pictures a request."
        answered = asyncio.create_task(self.app(scope, bounded, web.with_headers(counted, _HEADERS)))
        try:
            await asyncio.wait([answered])
            if not answered.cancelled():
                answered.result()
        finally:
            answered.cancel()  # where this task is cancelled itself
            if watcher:
                watcher.cancel()
            service.bytes -= got
            path = getattr(scope.get("route"), "path", "other")
            service.counts.requests.labels(path, status).inc()
            service.counts.seconds.labels(path).observe(time.monotonic() - start)


# What UniRL's newer clients compare, so that no answer is taken for another request's.
_IDENTITY = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "scorer_version", "idempotency_key")


def _kind(request: Request) -> str:
    """The type of a request's body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _parsed(body: bytes, expected: str) -> dict:
    """The JSON object of a body. Raises UserError, also for a text of very many parts."""
    if sum(body.count(part) for part in (b",", b"[", b"{")) > _PARTS:
        raise UserError(f"request: more than {_PARTS:,} commas and brackets, expected {expected}")
    return jsonl.parse(body, expected, "request")


def _names(name: str, given, allowed: Sequence[str]) -> list[str]:
    """Names of rewards, each once. Raises UserError for none, and for one that is not allowed."""
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        raise UserError(f"{name}: got {type(given).__name__}, expected a list of names that GET /rewards lists")
    if unknown := [one for one in dict.fromkeys(given) if one not in allowed]:
        raise UserError(f"{name}: got {unknown[0]!r:.80}, expected some of {allowed}")
    return list(dict.fromkeys(given))


def _list(given: Mapping, name: str) -> list:
    if not isinstance(value := given.get(name), list):
        raise UserError(f"{name}: got {value!r:.80}, expected a list")
    return value


async def _file(part) -> bytes:
    """The content of a form's file; b"" of anything else."""
    return b"" if part is None or isinstance(part, str) else await part.read()


def _from_base64(texts: Sequence) -> list[bytes | str]:
    """Each picture, or the reason why it is none. A data URI is taken too."""
    found = []
    for text in texts:
        try:
            text = text.partition(",")[2] if text.startswith("data:") else text
            found.append(binascii.a2b_base64(text.encode("ascii").translate(None, b" \t\r\n"), strict_mode=True))
        except (ValueError, AttributeError):
            found.append(f"image: got {text!r:.40}, expected a picture in base64")
    return found


def _encoded(heatmap: np.ndarray, kind: str) -> dict:
    """float32[h, w] in [0, 1] as a grey PNG, or as its numbers in float16, little endian, row by row; both in base64."""
    png = kind == "png"
    data = images.png(np.round(heatmap * 255).astype(np.uint8)) if png else heatmap.astype("<f2").tobytes()
    return {kind: base64.b64encode(data).decode(), "shape": list(heatmap.shape)}


def _as_pickle(value: dict, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(pickle.dumps(value, protocol=4), status, headers, "application/octet-stream")


def _json(value: dict, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, as a client's own texts may hold characters that UTF-8 has not."""
    return Response(json.dumps(value), status, headers, "application/json")


def _refused(request: Request, error: Refused) -> Response:
    return _json({"error": str(error)}, error.status, error.headers)


def _wrong(request: Request, error: UserError) -> Response:
    return _json({"error": command.printable(str(error))}, 422)


def _http(request: Request, error: HTTPException) -> Response:
    return _json({"error": error.detail}, error.status_code, error.headers)


def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_GONE)


def _fault(request: Request, error: Exception) -> Response:
    return _json({"error": _FAULT}, 500)
