"""Answers in a model's own words: sampled by transformers on the spot, or by an OpenAI-compatible server such as vLLM."""

# Shapes: B answers at a time, T tokens of the longest prompt, V vocabulary.

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microbat.models.base import Thinking
from microbat.pictures import Picture
from microbat.registry import unknown

TIMEOUT = 6 * 3600.0  # seconds to wait for one answer of a server: 38,912 tokens at two a second


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn; the defaults are those of BATQuant's reasoning benchmarks (arXiv 2603.16590, App. A)."""

    temperature: float = 0.6  # 0: the most likely token, always
    top_p: float = 0.95
    top_k: int = 20  # 0: all
    presence_penalty: float = 0.0  # taken once from the logit of every token that the answer has already
    max_new_tokens: int = 38_912
    seed: int = 0
    samples: int | None = None  # per problem; None: as many as the benchmark's published scores average
    batch_size: int = 8  # answers at a time on the spot, requests at a time to a server

    def __post_init__(self) -> None:
        checks = {
            "temperature": (_real(self.temperature) and self.temperature >= 0, "a number of at least 0"),
            "top_p": (_real(self.top_p) and 0 < self.top_p <= 1, "a number above 0, at most 1"),
            "top_k": (_whole(self.top_k) and self.top_k >= 0, "a whole number of at least 0"),
            "presence_penalty": (
                _real(self.presence_penalty) and abs(self.presence_penalty) <= 2,
                "a number from -2 to 2",
            ),
            "max_new_tokens": (_whole(self.max_new_tokens) and self.max_new_tokens >= 1, "a whole number above 0"),
            "seed": (_whole(self.seed), "a whole number"),
            "samples": (self.samples is None or _whole(self.samples) and self.samples >= 1, "a whole number above 0"),
            "batch_size": (_whole(self.batch_size) and self.batch_size >= 1, "a whole number above 0"),
        }
        for field, (holds, allowed) in checks.items():
            if not holds:
                raise ValueError(f"sampling: {field}={getattr(self, field)!r} is not {allowed}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Sampling":
        """From names and values, as a user writes them."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown("setting of sampling", name, known)
        return cls(**settings)

    @property
    def draws(self) -> dict[str, Any]:
        """What decides an answer: all but how many there are, and how many at a time."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("samples", "batch_size")}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, float) or _whole(value)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to draw. Equal requests to one model get equal answers."""

    prompt: str
    seed: int
    picture: Picture | None = None  # that the prompt asks about


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote; ``truncated`` where it ran out of tokens before its end."""

    text: str
    truncated: bool


Generate = Callable[[Sequence[Request]], Iterator[tuple[Request, Answer]]]


@dataclass(frozen=True, kw_only=True)
class OnTheSpot:
    """A transformers causal LM and its tokenizer, on the model's own device. Prompts go through the chat template. One that
    sees has a ``processor`` (see :class:`microbat.models.processor.Processor`).

    Every request draws from a generator of its own, so its answer does not depend on its neighbours in the batch (up to
    the rounding of padded batches), and no global random state is touched. Answers end where the model's context ends.
    """

    model: nn.Module
    tokenizer: Any
    sampling: Sampling
    cache: Callable[[nn.Module], Any] = lambda model: None  # a cache for each batch; None: transformers' own
    processor: Callable[..., dict[str, Tensor]] | None = None
    thinking: Thinking | None = (
        None  # whose tokens part thoughts from the answer, as <think> and </think> do in its text
    )

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        size = self.sampling.batch_size
        training = self.model.training
        try:
            self.model.eval()
            for start in range(0, len(requests), size):
                batch = requests[start : start + size]
                yield from zip(batch, self._answers(batch), strict=True)
        finally:
            self.model.train(training)

    def _answers(self, batch: Sequence[Request]) -> list[Answer]:
        from transformers import GenerationConfig

        model: Any = self.model
        prompts = [self._inputs(request) for request in batch]
        longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
        context = model.config.get_text_config().max_position_embeddings
        if longest >= context:
            raise ValueError(f"a prompt of {longest} tokens fills the model's context of {context}")
        stops = self._stops()
        inputs = _together(prompts, longest, stops[0])
        config = GenerationConfig(  # the model's own would fill in for whatever is not said
            max_new_tokens=min(self.sampling.max_new_tokens, context - longest),
            eos_token_id=stops,
            pad_token_id=stops[0],
            do_sample=False,  # the processor below has drawn already
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
        )
        out_BT = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            generation_config=config,
            logits_processor=[SeededDraw(self.sampling, [request.seed for request in batch], longest)],
            past_key_values=self.cache(model),
        )
        return [self._answer(new_T.tolist(), stops) for new_T in out_BT[:, longest:]]

    def _inputs(self, request: Request) -> dict[str, Tensor]:
        """What the model is called with for one prompt: input_ids [1, T], and what a processor makes of a picture."""
        if request.picture is not None:
            if self.processor is None:
                raise ValueError(f"the model has no image processor, and is asked about {request.picture.name}")
            return self.processor(request.picture.name, request.picture.image(), request.prompt)
        if self.tokenizer.chat_template is None:
            return {"input_ids": torch.tensor([self.tokenizer(request.prompt).input_ids])}
        messages = [{"role": "user", "content": request.prompt}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return {"input_ids": torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])}

    def _stops(self) -> list[int]:
        """Ends of text by the model's account and by its tokenizer's: a chat model's may differ."""
        model: Any = self.model
        own = model.generation_config.eos_token_id
        stops = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        if not stops:
            raise ValueError("neither the model nor its tokenizer says which token ends a text (eos_token_id)")
        return sorted(stops)

    def _answer(self, tokens: list[int], stops: list[int]) -> Answer:
        end = next((index for index, token in enumerate(tokens) if token in stops), None)
        return Answer(text=self._text(tokens[:end]), truncated=end is None)

    def _text(self, tokens: list[int]) -> str:
        if self.thinking is not None:
            names = (self.thinking.opening, self.thinking.closing)
            opening, closing = (self.tokenizer.convert_tokens_to_ids(name) for name in names)
            if closing in tokens:
                last = len(tokens) - 1 - tokens[::-1].index(closing)
                return f"<think>{self._decoded(tokens[:last])}</think>{self._decoded(tokens[last + 1 :])}"
            if opening in tokens:
                return f"<think>{self._decoded(tokens)}"
        return self._decoded(tokens)

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _together(prompts: Sequence[dict[str, Tensor]], longest: int, padding: int) -> dict[str, Tensor]:
    """One batch: what has a value per token is filled up on the left, pictures lie one after the other."""
    per_token = {"input_ids": padding, "mm_token_type_ids": 0, "attention_mask": 0}
    masked = [{**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])} for prompt in prompts]

    def filled(name: str, tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (longest - tensor.shape[1], 0), value=per_token[name])

    return {
        name: torch.cat([filled(name, own[name]) if name in per_token else own[name] for own in masked])
        for name in masked[0]
    }


class SeededDraw:
    """A logits processor that draws a token per row by the row's own generator and rules out all others.

    The distribution is that of transformers' warpers; the draw inverts its cumulative sum at one uniform number, made
    on the CPU, so that a seed means the same on every device. The penalty is that of OpenAI's API, on what follows the
    ``start`` tokens of the prompt.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], start: int = 0) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.greedy = sampling.temperature == 0
        self.penalty, self.start = sampling.presence_penalty, start
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers: list[Any] = []
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            self.warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if self.penalty:
            said_BV = torch.zeros_like(scores).scatter(-1, input_ids[:, self.start :], 1.0)
            scores = scores - self.penalty * said_BV
        if self.greedy:
            return scores
        scores_BV = scores.float()
        for warper in self.warpers:
            scores_BV = warper(input_ids, scores_BV)
        cumulative_BV = scores_BV.double().softmax(-1).cumsum(-1)
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self.generators])
        target_B1 = uniform[:, None].to(scores.device) * cumulative_BV[:, -1:]
        drawn_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)  # the first whose sum is above the target
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn_B1, 0.0)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model behind the chat completions of an OpenAI-compatible server, ``url`` as in http://localhost:8000/v1.

    ``top_k`` is an extension that vLLM, SGLang and llama.cpp understand. The key, where the server wants one, is the
    environment's OPENAI_API_KEY. Equal seeds give equal answers as far as the server promises that.
    """

    url: str
    sampling: Sampling

    @property
    def model(self) -> str:
        """The one model that the server has."""
        names = [entry["id"] for entry in self._ask("/models")["data"]]
        if len(names) != 1:
            raise ValueError(f"the server at {self.url} must serve one model, not {', '.join(names) or 'none'}")
        return names[0]

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        model = self.model
        pool = ThreadPoolExecutor(self.sampling.batch_size)
        try:
            running = {pool.submit(self._answer, model, request): request for request in requests}
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, model: str, request: Request) -> Answer:
        sampling = self.sampling
        body = {
            "model": model,
            "messages": [{"role": "user", "content": _content(request)}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.seed,
        }
        if sampling.presence_penalty:
            body["presence_penalty"] = sampling.presence_penalty
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        choice = self._ask("/chat/completions", body)["choices"][0]
        message = choice["message"]
        thoughts = message.get("reasoning_content") or message.get("reasoning")  # where the server parts them
        text = message["content"] or ""
        return Answer(
            text=f"<think>{thoughts}</think>{text}" if thoughts else text, truncated=choice["finish_reason"] == "length"
        )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = self.url.rstrip("/") + path
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(HttpRequest(url, data=data, headers=headers), timeout=TIMEOUT) as response:
                return json.load(response)
        except HTTPError as error:
            raise OSError(f"{url}: {error.code} {error.reason}: {error.read().decode(errors='replace')}") from error
        except URLError as error:
            raise OSError(f"{url}: no answer ({error.reason})") from error


def _content(request: Request) -> str | list[dict[str, Any]]:
    """A prompt as a server takes it: text, after the picture if there is one."""
    if request.picture is None:
        return request.prompt
    shown = {"type": "image_url", "image_url": {"url": request.picture.data_url()}}
    return [shown, {"type": "text", "text": request.prompt}]
