"""A router behind a small HTTP endpoint: POST an image, get a class or an abstention, within a latency budget.

    pip install "rsrouter[serve]"
    python examples/serve_fastapi.py org/router --budget-ms 300 --port 8000   # or a folder; default: the bundled router
    curl -F image=@shoe.png -F budget_ms=500 http://127.0.0.1:8000/predict
    python examples/serve_fastapi.py --quick   # serves on a free port, asks itself a few bundled images, and stops

What an answer means: with probability at least 1 - alpha over this request's own noise, the class is the one that the ideal
smoothed classifier gives to exactly these pixels; "abstained" means that the votes did not decide. Noise is fresh entropy for
each request, because a known seed voids the statement against an attacker. Asking again and again adds the alphas up.

The budget decides how many votes are drawn, from the speed of earlier requests only, so it cannot bend the answer; fewer votes
mean more abstentions, never less confidence. Requests run one after the other; the time spent waiting counts.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rsrouter import InputError, PlanError, RoutedSmooth, RSRouterError
from rsrouter.demo import CLASSES, load_router, load_slice
from rsrouter.speed import Speed, measure_speed

#: The demo's trained router, in a clone of the repository.
#: Larger uploads and pictures are refused before they are decoded.
MOST_BYTES, MOST_PIXELS = 8_000_000, 16_000_000
#: Share of the budget that votes may take; the rest is decoding, answering and bad luck.
SHARE = 0.8


class Busy(RSRouterError):
    """No time is left within the budget: 503."""


class TooLarge(InputError):
    """An upload over the limit: 413."""


class Budget:
    """n for a time, from the speed with every stage asked, and from how much slower than that the last requests were.

    Args:
        speed: measured when the service started.
        least, most: bounds of n.
    """

    def __init__(self, speed: Speed, least: int, most: int) -> None:
        self.speed, self.least, self.most = speed, least, most
        self.recent = deque([1.0], maxlen=50)

    @property
    def slowdown(self) -> float:
        return max(1.0, *self.recent)

    def votes(self, seconds: float) -> int:
        """n for a budget, 0 where even `least` votes do not fit."""
        n = self.speed.votes(SHARE * seconds / self.slowdown)
        return 0 if n < self.least else min(n, self.most)

    def needed(self) -> float:
        """The smallest budget in seconds."""
        return self.speed.seconds(self.least) * self.slowdown / SHARE

    def learn(self, n: int, seconds: float) -> None:
        self.recent.append(seconds / self.speed.seconds(n))


def fewest(routed: RoutedSmooth, alpha: float) -> int:
    """Votes below which hardly an image gets an answer: unanimous votes decide a plurality stage from log2(2 / alpha) on,
    thresholds need some more."""
    return 4 * math.ceil(math.log2(2 * max(len(path) for path in routed.tree.paths) / alpha))


def decode(content: bytes, shape: tuple[int, ...]) -> Tensor:
    """The pixels of a PNG, JPEG, ... as `(1, C, H, W)` in [0,1]. The answer is about exactly these pixels, so nothing is
    resized or converted here: other sizes and modes are refused."""
    if len(content) > MOST_BYTES:
        raise TooLarge("The upload is too large", expected=f"at most {MOST_BYTES:,} bytes", received=f"{len(content):,} bytes")
    mode, size = ("L" if shape[0] == 1 else "RGB"), (shape[2], shape[1])
    try:
        picture = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"))
        if picture.width * picture.height > MOST_PIXELS:
            raise TooLarge(
                "The picture is too large", expected=f"{size[0]} x {size[1]}", received=f"{picture.width} x {picture.height}"
            )
        if picture.mode != mode or picture.size != size:
            raise InputError(
                "The picture does not fit the classifier",
                expected=f"{size[0]} x {size[1]} pixels, mode {mode}",
                received=f"{picture.width} x {picture.height} pixels, mode {picture.mode}",
                remedy="resize and convert it before sending: what you send is what the answer is about",
            )
        array = np.array(picture, dtype=np.float32) / 255.0
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, RSRouterError):
            raise
        raise InputError(
            "The upload is not a picture",
            expected="PNG, JPEG or another format Pillow reads",
            received=f"{len(content):,} bytes that Pillow cannot decode",
            remedy="curl -F image=@picture.png",
        ) from error
    return torch.from_numpy(array[None, None] if shape[0] == 1 else array.transpose(2, 0, 1)[None].copy())


def problem(status: int, message: str, expected: str = "", received: str = "", remedy: str = "", **headers: str) -> JSONResponse:
    """Every error has one shape."""
    body = {"error": message, "expected": expected, "received": received, "remedy": remedy}
    return JSONResponse(body, status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()})


def create_app(
    routed: RoutedSmooth,
    *,
    classes: Sequence[str] | None = None,
    budget_ms: float = 300.0,
    alpha: float = 1e-3,
    device: str | None = None,
    most_votes: int = 10_000,
) -> FastAPI:
    """The service: `POST /predict`, `GET /health`; OpenAPI under `/docs`.

    Args:
        routed: what answers.
        classes: their names; None: those that the experts say.
        budget_ms: of a request that does not say its own.
        alpha: failure probability of an answer.
        device: where networks run.
        most_votes: per stage, however large the budget.
    """

    classes = routed.pool.labels if classes is None else classes

    @asynccontextmanager
    async def started(app: FastAPI) -> Any:
        app.state.budget = Budget(measure_speed(routed, device=device), fewest(routed, alpha), most_votes)
        yield

    app = FastAPI(title="rsrouter", description="Certified routing between smoothed experts.", lifespan=started)
    turn = threading.Lock()

    @app.exception_handler(RSRouterError)
    def typed(request: Request, error: RSRouterError) -> JSONResponse:
        text = (error.message, error.expected, error.received, error.remedy)
        if isinstance(error, Busy):
            return problem(503, *text, Retry_After="1")
        status = 413 if isinstance(error, TooLarge) else 422 if isinstance(error, InputError | PlanError) else 500
        return problem(status, *text)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return problem(
            422,
            f"Field {field!r}: {first['msg']}",
            "multipart/form-data with a file 'image' and optionally a number 'budget_ms'",
            repr(first.get("input"))[:100],
            "curl -F image=@picture.png -F budget_ms=300",
        )

    @app.get("/health")
    def health() -> dict[str, Any]:
        plan: Budget = app.state.budget
        return {
            "digest": routed.digest,
            "experts": [{"name": e.name, "sigma": e.sigma} for e in routed.pool],
            "input_shape": list(routed.pool.input_shape),
            "alpha": alpha,
            "budget_ms": budget_ms,
            "votes_per_second": round(plan.speed.votes_per_second),
            "slowdown": round(plan.slowdown, 2),
            "smallest_budget_ms": math.ceil(1000 * plan.needed()),
        }

    # not async: FastAPI runs it in a thread, and the server goes on taking requests
    @app.post("/predict")
    def predict(image: Annotated[UploadFile, File()], wanted_ms: Annotated[float | None, Form(alias="budget_ms")] = None) -> Any:
        arrived, plan = time.perf_counter(), app.state.budget
        budget = (budget_ms if wanted_ms is None else wanted_ms) / 1000
        pixels = decode(image.file.read(MOST_BYTES + 1), routed.pool.input_shape)
        if not (math.isfinite(budget) and budget >= plan.needed()):
            raise InputError(
                "The latency budget is too small for any answer",
                expected=f"budget_ms of at least {math.ceil(1000 * plan.needed())}",
                received=f"{1000 * budget:g}",
                remedy="raise it, serve from a faster device, or take a larger alpha",
            )
        # waiting for others takes from the budget as well
        got = turn.acquire(timeout=max(budget - plan.needed(), 0.0))
        try:
            n = plan.votes(budget - (time.perf_counter() - arrived)) if got else 0
            if n == 0:
                raise Busy(
                    "Too many requests for this budget",
                    expected="a free turn within the budget",
                    received=f"{1000 * (time.perf_counter() - arrived):.0f} of {1000 * budget:.0f} ms spent waiting",
                    remedy="try again, or send fewer requests at once",
                )
            start = time.perf_counter()
            answer = int(routed.predict(pixels, n=n, alpha=alpha, device=device)[0])  # fresh entropy: no seed is given
            plan.learn(n, time.perf_counter() - start)
        finally:
            if got:
                turn.release()
        return {
            "class": None if answer < 0 else answer,
            "name": None if answer < 0 or classes is None else classes[answer],
            "abstained": answer < 0,
            "alpha": alpha,
            "votes_per_stage": n,
            "milliseconds": round(1000 * (time.perf_counter() - arrived), 1),
            "digest": routed.digest,
        }

    return app


def multipart(url: str, content: bytes, **fields: object) -> tuple[int, dict[str, Any]]:
    """POSTs a picture and fields with the standard library; status and JSON."""
    mark = "----rsrouter"
    parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="i.png"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join([*parts, head.encode(), content, f"\r\n--{mark}--\r\n".encode()])
    request = urllib.request.Request(url, body, {"Content-Type": f"multipart/form-data; boundary={mark}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def as_png(image: Tensor) -> bytes:
    """`(C, H, W)` in [0,1] as PNG bytes."""
    array = (image * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def ask_itself(app: FastAPI) -> None:
    """Serves on a free port, sends a few bundled images and one bad upload, and stops."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.02)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/predict"
    test = load_slice("test")
    try:
        for i in range(3):
            status, answer = multipart(url, as_png(test.image(i)), budget_ms=2000)
            print(f"image {i}: {status} {json.dumps(answer)}")
        print("not a picture: {} {}".format(*multipart(url, b"hello")))
        print("too small a budget: {} {}".format(*multipart(url, as_png(test.image(0)), budget_ms=0.001)))
    finally:
        server.should_exit = True
        thread.join()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("router", nargs="?", help="folder or org/name of a router; default: the demo's")
    parser.add_argument("--classes", type=Path, help="text file, one class name per line")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--budget-ms", type=float, default=300.0, help="latency budget of a request that does not say its own")
    parser.add_argument("--alpha", type=float, default=1e-3, help="failure probability of an answer")
    parser.add_argument("--most-votes", type=int, default=10_000, help="per stage, however large the budget")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="serve, ask itself a few bundled images, stop")
    chosen = parser.parse_args(arguments)
    classes: Sequence[str] | None = chosen.classes.read_text().splitlines() if chosen.classes else None
    if chosen.router and not chosen.quick:
        routed = RoutedSmooth.from_pretrained(chosen.router)
    else:
        routed, classes = load_router(), CLASSES
    options = {"budget_ms": chosen.budget_ms, "alpha": chosen.alpha, "device": chosen.device, "most_votes": chosen.most_votes}
    if chosen.quick:
        ask_itself(create_app(routed, classes=classes, **options | {"most_votes": 200}))
    else:
        uvicorn.run(create_app(routed, classes=classes, **options), host=chosen.host, port=chosen.port)


if __name__ == "__main__":
    main()
