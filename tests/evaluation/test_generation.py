"""Answers drawn by transformers on the spot: by each request's own seed, from the right distribution; and by a server."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from microbat.evaluation.generation import Answer, OnTheSpot, Request, Sampling, SeededDraw, Served
from microbat.models.base import Thinking

REQUESTS = [Request(prompt=prompt, seed=seed) for seed in (3, 4) for prompt in ("Say it.", "And what of this, then?")]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def parts(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny("qwen3")), AutoTokenizer.from_pretrained(tiny("qwen3"))


def answers(parts, requests, **settings):
    model, tokenizer = parts
    sampling = Sampling(**{"max_new_tokens": 7, "top_k": 200, "temperature": 2.0, **settings})
    return dict(OnTheSpot(model=model, tokenizer=tokenizer, sampling=sampling)(requests))


def test_a_requests_answer_depends_on_nothing_but_itself(parts):
    model, _ = parts
    model.train()
    state = torch.get_rng_state()
    together = answers(parts, REQUESTS, batch_size=4)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert together == answers(parts, REQUESTS[::-1], batch_size=3)
    assert together == {request: answer for one in REQUESTS for request, answer in answers(parts, [one]).items()}
    assert len({answer.text for answer in together.values()}) == len(REQUESTS)


def test_greedy_is_what_generate_writes(parts):
    model, tokenizer = parts
    (answer,) = answers(parts, REQUESTS[:1], temperature=0).values()
    ids = tokenizer(REQUESTS[0].prompt, return_tensors="pt")
    expected = model.generate(**ids, do_sample=False, max_new_tokens=7, pad_token_id=0)[0, ids.input_ids.shape[1] :]
    assert answer == Answer(text=tokenizer.decode(expected), truncated=0 not in expected.tolist())


def test_draws_follow_the_warped_distribution():
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5])
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=4)
    count = 4000
    draw = SeededDraw(sampling, range(count))
    scores_BV = draw(torch.zeros(count, 1, dtype=torch.long), logits_V.expand(count, -1))
    assert torch.isfinite(scores_BV).sum(-1).eq(1).all()
    shares_V = scores_BV.argmax(-1).bincount(minlength=6) / count
    p_V = (logits_V / 0.7).softmax(-1)
    kept = [0, 5, 1]  # of the four likeliest, 0.9 of their mass is reached at the third
    expected_V = torch.zeros(6)
    expected_V[kept] = p_V[kept] / p_V[kept].sum()
    assert (shares_V - expected_V).abs().max() < 4 * (0.25 / count) ** 0.5
    assert shares_V[[2, 3, 4]].eq(0).all()


def test_prompts_go_through_the_chat_template(parts):
    model, tokenizer = parts
    generate, hi = OnTheSpot(model=model, tokenizer=tokenizer, sampling=Sampling()), Request(prompt="Hi", seed=0)
    try:
        tokenizer.chat_template = TEMPLATE
        assert tokenizer.decode(generate._inputs(hi)["input_ids"][0]) == "[user] Hi[a]"
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(generate._inputs(hi)["input_ids"][0]) == "Hi"


def test_thoughts_end_at_the_familys_token(parts):
    """Here a token of bytes: "(" opens thoughts and ")" closes them; decoding alone would drop tokens that are special."""
    model, tokenizer = parts
    thinking = Thinking(modes=(), opening="(", closing=")")
    generate = OnTheSpot(model=model, tokenizer=tokenizer, sampling=Sampling(), thinking=thinking)
    texts = {
        "(Why?)So.": "<think>(Why?</think>So.",
        "a)b)So.": "<think>a)b</think>So.",
        "(Why": "<think>(Why",
        "So.": "So.",
    }
    for text, expected in texts.items():
        assert generate._text(tokenizer(text).input_ids) == expected
    assert OnTheSpot(model=model, tokenizer=tokenizer, sampling=Sampling())._text(tokenizer("(a)b").input_ids) == "(a)b"


def test_settings_of_the_models_own_are_not_mixed_in(parts):
    model, _ = parts
    plain = answers(parts, REQUESTS)
    before = model.generation_config.to_dict()
    try:
        model.generation_config.update(do_sample=True, temperature=0.1, top_p=0.5, top_k=3, repetition_penalty=3.0)
        assert answers(parts, REQUESTS) == plain
    finally:
        model.generation_config.update(**{k: before.get(k) for k in ("do_sample", "temperature", "top_p", "top_k")})
        model.generation_config.repetition_penalty = before.get("repetition_penalty")


def test_answers_end_at_the_end_of_text_or_of_the_context(parts):
    many = [Request(prompt="Say it.", seed=seed) for seed in range(40)]
    drawn = answers(parts, many, max_new_tokens=1000, batch_size=40, temperature=3.0, top_k=0, top_p=1.0)
    ended = [answer for answer in drawn.values() if not answer.truncated]
    assert 0 < len(ended) < len(many)
    assert not any("<|endoftext|>" in answer.text for answer in drawn.values())
    with pytest.raises(ValueError, match="300 tokens fills the model's context of 256"):
        answers(parts, [Request(prompt="x" * 300, seed=0)])


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_k", 2.5), ("max_new_tokens", 0), ("samples", 0)],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} is not a"):
        Sampling.of({field: value})


def test_unknown_settings_are_refused_with_suggestions():
    with pytest.raises(ValueError, match="'temprature'; did you mean 'temperature'"):
        Sampling.of({"temprature": 1})


@contextmanager
def server(reply, models=("tiny",)):
    """An OpenAI-compatible server that says ``reply(body)``; yields its URL and the (path, key, body) it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            status, message, finish = reply(body)
            self.send({"choices": [{"message": message, "finish_reason": finish}]}, status)

        def send(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}/v1", asked
        finally:
            http.shutdown()
            thread.join()


def echo(body):
    message = {"content": f"{body['messages'][0]['content']} {body['seed']}"}
    return 200, message, "length" if body["seed"] == 4 else "stop"


def test_a_server_is_asked_what_sampling_says(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    with server(echo) as (url, asked):
        drawn = dict(Served(url=url, sampling=Sampling(seed=9))(REQUESTS))
    assert drawn == {r: Answer(text=f"{r.prompt} {r.seed}", truncated=r.seed == 4) for r in REQUESTS}
    assert {path for path, _, _ in asked} == {"/v1/chat/completions"}
    assert {key for _, key, _ in asked} == {"Bearer key"}
    body = next(body for _, _, body in asked if body["seed"] == 3)
    del body["messages"]
    expected = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 38912}
    assert body == {"model": "tiny", "seed": 3, **expected}


def test_thoughts_that_a_server_parts_from_the_answer_come_before_it():
    message = {"content": "\\boxed{2}", "reasoning_content": "One and one."}
    with server(lambda body: (200, message, "stop")) as (url, _):
        (answer,) = dict(Served(url=url, sampling=Sampling())(REQUESTS[:1])).values()
    assert answer.text == "<think>One and one.</think>\\boxed{2}"


def test_what_a_server_refuses_is_shown():
    with server(lambda body: (400, "max_tokens is too large", None)) as (url, _):
        generate = Served(url=url, sampling=Sampling())
        with pytest.raises(OSError, match="400 Bad Request.*max_tokens is too large"):
            list(generate(REQUESTS))
    with pytest.raises(OSError, match="no answer"):
        list(generate(REQUESTS))
    with server(echo, models=("a", "b")) as (url, _), pytest.raises(ValueError, match="must serve one model, not a, b"):
        list(Served(url=url, sampling=Sampling())(REQUESTS))
