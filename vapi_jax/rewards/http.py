"""A reward on another machine: PNGs and prompts are posted to a URL, numbers come back.

    POST URL   {"images": [base64 of a PNG, ...], "prompts": ["a red cat", ...]}
    200        {"scores": [0.25, ...]}             a finite number for each image, higher is better

Whatever fails is tried again with growing pauses where that can help (no connection, no answer in time, 429,
5xx), and stops the run with the reason otherwise: no failure is worth 0. An answer may have so many bytes and
no more; redirections are not followed. The URL is the user's own, from a recipe or a command line.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.host_calls import on_host
from vapi_jax.common.images import to_uint8
from vapi_jax.common.options import Count, Natural, Positive
from vapi_jax.common.paths import PathText
from vapi_jax.rewards.clip import class_prompts
from vapi_jax.rewards.prompts import LETTERS, from_bytes, texts_of, to_bytes
from vapi_jax.rewards.reward import Batch, Reward, Rewards

_LONGEST_PAUSE = 60.0  # seconds
_FOR_A_SCORE = 64  # bytes of an answer, and
_FOR_AN_ANSWER = 1 << 16


class HTTPRewardError(ExpectedError, RuntimeError):
    """A server that gave no rewards; says what it was asked, what it did and what to look at."""


class _Again(Exception):
    """What went wrong, and may not the next time."""


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class HTTP(Reward):
    """What a server says of samples.

    Attributes:
      url: http:// or https://.
      timeout: seconds that a request may take, answer included.
      retries: further tries of a request.
      backoff: seconds before the first of them; each pause is twice the last.
      at_once: images of a request.
      prompts, template: see `vapi_jax.rewards.clip.CLIPScore`.
    """

    wants_image: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False

    url: str = ""
    timeout: Positive = 60.0
    retries: Natural = 4
    backoff: Positive = 1.0
    at_once: Count = 16
    prompts: PathText = ""
    template: str = "a photo of {}"

    def problems(self, side: int) -> list[str]:
        lines = super().problems(side)
        try:
            parts = urllib.parse.urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of a port that is no number, or half a bracket
            known = False
        if not known or not re.fullmatch("[!-~]+", self.url):
            lines.append(f"url={self.url!r}: wants http://HOST:PORT/PATH or https://...")
        return lines

    def prepare(self, raw: Any) -> UInt8[np.ndarray, "B L"] | None:
        if not self.prompts:
            return to_bytes(texts_of(raw))
        class_prompts(self.prompts, self.template)  # here a list that is not there stops no step
        return None

    def example(self, rows: int) -> Any:
        return None if self.prompts else jax.ShapeDtypeStruct((rows, LETTERS), jnp.uint8)

    def __call__(self, weights: Any, pixels: Float[Array, "B G H W 3"], batch: Batch) -> Rewards:
        del weights
        shape = pixels.shape[:2]
        key = "condition" if self.prompts else "prompt"
        if key not in batch or not hasattr(batch[key], "ndim"):
            raise ValueError(
                "a reward by prompts has none: for data with labels say what they are called "
                "(prompts='imagenet', or a file with a name a line)"
            )

        def call(pixels: Any, asked: Any) -> np.ndarray:
            rows = self._texts(np.asarray(asked))
            texts = [text for text in rows for _ in range(shape[1])]
            images = to_uint8(pixels).reshape(-1, *pixels.shape[2:])
            return self.ask(images, texts).reshape(shape)

        return on_host(call, jax.ShapeDtypeStruct(shape, jnp.float32), pixels, batch[key])

    def _texts(self, asked: np.ndarray) -> list[str]:
        if not self.prompts:
            return from_bytes(asked)
        names = class_prompts(self.prompts, self.template)
        if asked.max(initial=0) >= len(names):
            raise HTTPRewardError(f"label {asked.max()}, and {self.prompts} names {len(names)}")
        return [names[label] for label in asked]

    def ask(
        self, images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " N"]:
        """What the server says of images.

        Raises:
          HTTPRewardError: it says nothing, or something else than a finite number for each image.
        """
        found: list[float] = []
        for start in range(0, len(images), self.at_once):
            part = slice(start, start + self.at_once)
            found += self._request(images[part], prompts[part])
        return np.array(found, np.float32)

    def _request(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        asked = {"images": list(map(_png, images)), "prompts": list(prompts)}
        body, reasons = json.dumps(asked).encode(), []
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff * 2.0 ** (attempt - 1), _LONGEST_PAUSE))
            try:
                return self._scores(self._post(body, len(images)), len(images))
            except _Again as error:
                reasons.append(str(error))
        raise HTTPRewardError(
            f"reward http: {self.url} gave no scores in {len(reasons)} tries, the last time: "
            f"{reasons[-1]}. Is the server up, and fast enough for timeout? A run goes on from its last "
            "checkpoint when the same command is given again"
        )

    def _post(self, body: bytes, count: int) -> bytes:
        most, end = _FOR_AN_ANSWER + _FOR_A_SCORE * count, time.monotonic() + self.timeout
        request = urllib.request.Request(
            self.url, body, {"Content-Type": "application/json", "Accept": "application/json"}
        )
        opener = urllib.request.build_opener(_NoRedirection)
        try:
            with opener.open(request, timeout=self.timeout) as answer:
                data, promised = b"", answer.length or 0
                # A server that sends a byte a minute must not hold a run: the end is that of all.
                while part := answer.read1(most + 1 - len(data)):
                    data += part
                    if len(data) > most:
                        raise HTTPRewardError(
                            f"reward http: {self.url} answers with more than {most} bytes for {count} images"
                        )
                    if time.monotonic() > end:
                        raise _Again(f"no whole answer in {self.timeout:g} s")
                if len(data) < promised:
                    raise _Again(f"the answer ended after {len(data)} of {promised} bytes")
                return data
        except urllib.error.HTTPError as error:
            said = b""
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                said = error.read(500)
            told = f"status {error.code} {error.reason}: {said.decode('utf-8', 'replace')!r}"
            if error.code == 429 or error.code >= 500:
                raise _Again(told) from error
            raise HTTPRewardError(f"reward http: {self.url}: {told}") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"{type(error).__name__}: {error}") from error

    def _scores(self, data: bytes, count: int) -> list[float]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise HTTPRewardError(
                f"reward http: {self.url} answers with no JSON ({error}): {data[:80]!r}"
            ) from error
        scores = value.get("scores") if isinstance(value, Mapping) else None
        if not isinstance(scores, list) or len(scores) != count:
            raise HTTPRewardError(
                f'reward http: {self.url} was asked about {count} images; {{"scores": [{count} numbers]}} '
                f"is wanted, not {data[:80]!r}"
            )
        for i, score in enumerate(scores):
            known = isinstance(score, int | float) and not isinstance(score, bool)
            if not known or not math.isfinite(score) or abs(score) > np.finfo(np.float32).max:
                raise HTTPRewardError(
                    f"reward http: {self.url} says {score!r:.40} of image {i}: no finite number"
                )
        return [float(score) for score in scores]


def _png(image: UInt8[np.ndarray, "H W 3"]) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
