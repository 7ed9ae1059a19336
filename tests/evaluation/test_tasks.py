"""The harness's tasks on local copies: same prompts, same metrics, and all six run on a tiny model."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from microbat.evaluation.tasks import run_tasks, task_names, write_task_files

TASKS = ["arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande"]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
OWN_FILES = {  # of lm-evaluation-harness, below lm_eval/tasks
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
ARC_ROWS = [
    {
        "id": "a",
        "question": "What is red?",
        "choices": {"text": ["a cat", "a dog on a rug"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    {
        "id": "b",
        "question": "Who has a hat?",
        "choices": {"text": ["the cat", "the dog", "red"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
    {
        "id": "c",
        "question": "Is it a mat?",
        "choices": {"text": ["yes it is", "no"], "label": ["A", "B"]},
        "answerKey": "A",
    },
]
ROWS = {
    "arc_challenge": ARC_ROWS,
    "arc_easy": ARC_ROWS,
    "boolq": [  # "label" is what the harness's own task reads, from another copy of the data
        {"question": "is the cat red", "answer": True, "label": 1, "passage": "The cat is red."},
        {"question": "is the dog red", "answer": False, "label": 0, "passage": "The cat is red."},
        {"question": "is the rug red", "answer": False, "label": 0, "passage": "The rug is not red."},
    ],
    "hellaswag": [
        {
            "activity_label": "Cats",
            "ctx_a": "The cat [title] sat [step] on.",
            "ctx_b": "the dog",
            "endings": ["is  red", "[header] is a hat", "on a rug", "no"],
            "label": "3",
        },
        {
            "activity_label": "Dogs",
            "ctx_a": "The dog sat.",
            "ctx_b": "",
            "endings": ["on it", "on a mat", "is a dog [title] red", "yes"],
            "label": "0",
        },
        {
            "activity_label": "Hats",
            "ctx_a": "A hat is.",
            "ctx_b": "it",
            "endings": ["red", "on", "no", "yes"],
            "label": "1",
        },
    ],
    "piqa": [
        {"goal": "How is a cat red?", "sol1": "The cat is on a rug.", "sol2": "The cat is on a red rug.", "label": 1},
        {"goal": "Who sat on it?", "sol1": "the dog", "sol2": "the hat on a mat", "label": 0},
        {"goal": "What is it?", "sol1": "a mat", "sol2": "a hat", "label": 0},
    ],
    "winogrande": [
        {"sentence": "The cat sat on the dog so _ is on the rug.", "option1": "cat", "option2": "dog", "answer": "1"},
        {"sentence": "The hat is red and _ is not a mat.", "option1": "the mat", "option2": "the hat", "answer": "2"},
        {"sentence": "The dog has a hat so the _ is red.", "option1": "hat", "option2": "dog", "answer": "1"},
    ],
}


@pytest.fixture
def data(tmp_path):
    """A folder of local copies whose name needs quoting in YAML."""
    folder = tmp_path / 'local: "copies" {100%} $here'
    for task, rows in ROWS.items():
        (folder / task).mkdir(parents=True)
        (folder / task / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "a cat dog rug mat hat is red on the The it no yes not and so has sat Who What How Is . ? : Question Answer"
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *words.split()])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return LlamaForCausalLM(config)


def check_scores(scores, limit):
    assert sorted(scores) == TASKS
    for task, values in scores.items():
        metrics = {"acc"} if task in ("boolq", "winogrande") else {"acc", "acc_norm"}
        assert set(values) == {"n", "items"} | metrics | {f"{metric}_stderr" for metric in metrics}
        assert values["n"] == limit
        assert values["items"].keys() == metrics
        assert all(statistics.fmean(items) == pytest.approx(values[m]) for m, items in values["items"].items())
        assert all(values[metric] * limit == round(values[metric] * limit) for metric in metrics)


def test_names_are_the_task_files():
    assert task_names() == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_metrics_are_the_harness_own(task, data, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    write_task_files({task: data / task / "validation.jsonl"}, tmp_path)
    ours = load_yaml(tmp_path / f"{task}.yaml")
    own = load_yaml(Path(lm_eval.__file__).parent / "tasks" / OWN_FILES[task])
    own |= {key: ours[key] for key in ("dataset_path", "dataset_kwargs")} | {"dataset_name": None}
    own |= {"training_split": None, "test_split": None}  # the local copies are validation splits
    built = [ConfigurableTask(config={**config, "num_fewshot": 0}) for config in (ours, own)]
    for made in built:
        made.build_all_requests(limit=None, rank=0, world_size=1)
    requests, expected = ([(r.doc_id, r.idx, r.arguments) for r in made.instances] for made in built)
    assert len(requests) >= 2 * len(ROWS[task])
    assert requests == expected
    for kept in (lambda made: made.aggregation().keys(), lambda made: made.higher_is_better()):
        assert kept(built[0]) == kept(built[1])
    targets = [[made.doc_to_target(doc) for doc in made.validation_docs()] for made in built]
    assert targets[0] == targets[1]


def test_all_tasks_run_from_local_copies_and_leave_everything_as_it_was(model, tokenizer, data):
    pytest.importorskip("lm_eval")
    model.train()
    random_state = torch.get_rng_state()
    scores = run_tasks(model, tokenizer, TASKS, data=data, limit=2, batch_size=3)
    check_scores(scores, limit=2)
    assert model.training
    assert tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert run_tasks(model, tokenizer, ["piqa"], data=data, limit=2) == {"piqa": scores["piqa"]}


def test_scores_are_those_of_the_likelihoods(model, tokenizer, data):
    pytest.importorskip("lm_eval")
    hits = []
    for row in ROWS["piqa"]:
        question = f"Question: {row['goal']}\nAnswer:"
        start = len(tokenizer(question).input_ids)
        sums = []
        for solution in (row["sol1"], row["sol2"]):
            ids = torch.tensor(tokenizer(f"{question} {solution}").input_ids)
            with torch.no_grad():
                logp = model.eval()(ids[None]).logits[0].log_softmax(-1)
            sums.append(logp[:-1].gather(-1, ids[1:, None])[start - 1 :].sum().item())
        hits.append(sums.index(max(sums)) == row["label"])
    assert run_tasks(model, tokenizer, ["piqa"], data=data)["piqa"]["acc"] == pytest.approx(sum(hits) / 3)


def test_few_shots_are_drawn_the_same_every_time(model, tokenizer, data):
    pytest.importorskip("lm_eval")
    first, second = (run_tasks(model, tokenizer, ["arc_easy"], data=data, num_fewshot=1) for _ in range(2))
    assert first == second


def test_all_tasks_run_on_the_real_rows(model, tokenizer):
    pytest.importorskip("lm_eval")
    if not all((SHARED / task / "validation.jsonl").is_file() for task in TASKS):
        pytest.skip("no benchmark data beside the checkout")
    check_scores(run_tasks(model, tokenizer, TASKS, data=SHARED, limit=2), limit=2)


def test_unknown_names_are_refused_with_suggestions(data):
    with pytest.raises(ValueError, match="unknown task 'arc_esay'; did you mean 'arc_easy'"):
        run_tasks(None, None, ["piqa", "arc_esay"], data=data)
    with pytest.raises(ValueError, match="no tasks given"):
        run_tasks(None, None, [], data=data)


def test_unknown_names_of_the_harness_are_refused_with_suggestions():
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="unknown task 'helaswag'; did you mean 'hellaswag'"):
        run_tasks(None, None, ["helaswag"])


@pytest.mark.parametrize(("setting", "value"), [("limit", 0), ("num_fewshot", -1)])
def test_bad_numbers_are_refused(data, setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        run_tasks(None, None, ["piqa"], data=data, **{setting: value})


def test_a_missing_copy_is_named(data):
    (data / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="piqa"):
        run_tasks(None, None, ["boolq", "piqa"], data=data)


def test_without_the_extra_the_install_command_is_given(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'microbat\[tasks\]'"):
        run_tasks(None, None, ["piqa"], data=data)
