"""Answers about pictures: on the spot as the model itself writes them, alone or in a batch, and from a server."""

import base64
import io

import pytest
import torch
from tests.evaluation.test_generation import server

from microbat.evaluation.generation import OnTheSpot, Request, Sampling, Served
from microbat.pictures import Picture

Pil = pytest.importorskip("PIL.Image")


def picture(width: int, height: int, seed: int) -> Picture:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Pil.fromarray(pixels.numpy()).save(file, format="PNG")
    return Picture(name=f"picture {seed}", read=file.getvalue)


REQUESTS = [
    Request(prompt="What is it?", seed=1, picture=picture(16, 24, 1)),
    Request(prompt="And what of this, then?", seed=2, picture=picture(40, 16, 2)),
    Request(prompt="Why?", seed=3, picture=picture(8, 8, 3)),
]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def parts(request, tiny):
    from transformers import AutoModelForImageTextToText

    from microbat.models.processor import Processor

    return AutoModelForImageTextToText.from_pretrained(tiny(request.param)).eval(), Processor(tiny(request.param))


def answers(parts, requests, **settings):
    model, processor = parts
    sampling = Sampling(**{"max_new_tokens": 6, "temperature": 0, "batch_size": 3, **settings})
    generate = OnTheSpot(model=model, tokenizer=processor.tokenizer, sampling=sampling, processor=processor)
    return dict(generate(requests))


def test_greedy_is_the_models_own_likeliest_token_after_token(parts):
    model, processor = parts
    request = REQUESTS[1]
    (answer,) = answers(parts, [request]).values()
    inputs = processor("", request.picture.image(), request.prompt)
    expected: list[int] = []
    for _ in range(6):
        said = torch.tensor([expected], dtype=torch.int64)
        ids = torch.cat([inputs["input_ids"], said], dim=1)
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(said, dtype=torch.int32)], dim=1)
        whole = {**inputs, "input_ids": ids, "mm_token_type_ids": kinds}
        with torch.no_grad():
            expected.append(int(model(**whole).logits[0, -1].argmax()))
    end = expected.index(0) if 0 in expected else None
    assert answer.text == processor.tokenizer.decode(expected[:end], skip_special_tokens=True)
    assert answer.truncated == (end is None)


def test_neighbours_in_a_batch_change_nothing(parts):
    together = answers(parts, REQUESTS)
    alone = {request: answer for one in REQUESTS for request, answer in answers(parts, [one]).items()}
    assert together == alone
    assert len({answer.text for answer in together.values()}) > 1


def test_the_picture_matters(parts):
    other = Request(prompt=REQUESTS[0].prompt, seed=1, picture=picture(16, 24, 9))
    drawn = answers(parts, [REQUESTS[0], other], max_new_tokens=24)
    assert len({answer.text for answer in drawn.values()}) == 2


def test_a_picture_needs_a_processor(parts):
    model, processor = parts
    generate = OnTheSpot(model=model, tokenizer=processor.tokenizer, sampling=Sampling())
    with pytest.raises(ValueError, match="no image processor, and is asked about picture 1"):
        list(generate(REQUESTS[:1]))


def test_a_text_model_is_not_asked_about_pictures(tiny):
    from microbat.models.processor import Processor

    with pytest.raises(ValueError, match="no image_token_id in its config.json: it cannot be asked about pictures"):
        Processor(tiny("qwen3"))


def test_a_penalty_keeps_an_answer_from_repeating_itself(parts):
    plain = answers(parts, REQUESTS, max_new_tokens=40)
    penalized = answers(parts, REQUESTS, max_new_tokens=40, presence_penalty=2.0)
    different = [len(set(answer.text.split())) for answer in plain.values()]
    assert sum(len(set(answer.text.split())) for answer in penalized.values()) >= sum(different)
    assert plain != penalized


def test_a_server_gets_the_picture_before_the_prompt():
    reply = (200, {"content": "Red."}, "stop")
    with server(lambda body: reply) as (url, asked):
        sampling = Sampling(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=2.0, max_new_tokens=9)
        (answer,) = dict(Served(url=url, sampling=sampling)(REQUESTS[:1])).values()
    assert answer.text == "Red."
    ((_, _, body),) = asked
    shown, said = body["messages"][0]["content"]
    head, _, data = shown["image_url"]["url"].partition(",")
    assert (shown["type"], head) == ("image_url", "data:image/png;base64")
    assert base64.b64decode(data) == REQUESTS[0].picture.read()
    assert said == {"type": "text", "text": "What is it?"}
    assert body["presence_penalty"] == 2.0
