"""Every token is predicted once, and the windows are those of the standard protocol."""

from types import SimpleNamespace

import pytest
import torch

from microbat.evaluation.windows import tokenize, windows


def test_windows_do_not_overlap_by_default_and_leave_out_the_rest():
    cut = windows(list(range(35)), window=8)
    assert cut.tokens_WT.tolist() == [list(range(start, start + 8)) for start in (0, 8, 16, 24)]
    assert [fresh for _, fresh in cut] == [7, 7, 7, 7]
    assert (len(cut), cut.window, cut.stride, cut.num_predictions) == (4, 8, 8, 28)
    assert len(windows(torch.arange(35), window=8, limit=3)) == 3
    assert len(windows(torch.arange(35), window=8, limit=9)) == 4
    later = windows(torch.arange(35), window=8, limit=2, skip=1)
    assert (later.tokens_WT.tolist(), later.skipped) == (cut.tokens_WT[1:3].tolist(), 1)


@pytest.mark.parametrize("stride", [1, 3, 5, 7])
def test_overlapping_windows_count_each_token_once(stride):
    cut = windows(torch.arange(50), window=8, stride=stride)
    counted = [token for inputs, fresh in cut for token in inputs["input_ids"][0, -fresh:].tolist()]
    assert counted == list(range(1, cut.tokens_WT[-1, -1].item() + 1))
    assert cut.num_predictions == len(counted)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"window": 1}, "window=1 predicts nothing"),
        ({"window": 8, "stride": 9}, "stride=9 is not between 1 and window=8"),
        ({"window": 8, "stride": 0}, "stride=0"),
        ({"window": 8, "limit": 0}, "limit=0 leaves no window"),
        ({"window": 36}, "35 tokens, fewer than one window of 36"),
        ({"window": 8, "skip": 4}, "skip=4 is not between 0 and the text's 4 windows less one"),
        ({"window": 8, "skip": -1}, "skip=-1"),
    ],
)
def test_errors_name_field_and_value(settings, problem):
    with pytest.raises(ValueError, match=problem):
        windows(torch.arange(35), **settings)


def test_a_batch_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"shape \[1, 35\]"):
        windows(torch.arange(35)[None], window=8)


def test_tokenize_leaves_special_tokens_to_the_tokenizer():
    def tokenizer(text, verbose):
        assert not verbose  # no warning about a text longer than the context
        return SimpleNamespace(input_ids=[1, *map(ord, text)])

    assert tokenize("ab", tokenizer).tolist() == [1, 97, 98]
