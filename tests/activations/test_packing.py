from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.activations.streams import files
from transcoder.activations.documents import RECORD_BLOCK_LENGTH, DataError, Document, Unusable
from transcoder.activations.language_model import HookedModel
from transcoder.activations.packing import Packer, sequence_ids
from transcoder.activations.vocabulary import Vocabulary, bytes_spelled

PAD, EOS, BOS = 0, 1, 2


@pytest.fixture
def vocabulary(hooked: HookedModel) -> Vocabulary:
    return hooked.vocabulary


@pytest.fixture
def make_packer(jsonl: Path, vocabulary: Vocabulary) -> Callable[..., Packer]:
    def make(length: int = 16, prepend_bos: bool = True, keep: Callable[[Document], bool] | None = None) -> Packer:
        return Packer(files(jsonl, "text", None), vocabulary, length, prepend_bos, keep or (lambda _: True))

    return make


def reference(documents: list[str], vocabulary: Vocabulary) -> list[int]:
    """The epoch's ids: documents one after another, EOS behind each."""
    flat: list[int] = []
    for i, text in enumerate(documents):
        flat += [*vocabulary.encode(Document(i, str(i), text)).tolist(), EOS]
    return flat


def test_sequences_are_bos_and_the_text_in_order(
    make_packer: Callable[..., Packer], documents: list[str], vocabulary: Vocabulary
) -> None:
    expected = reference(documents, vocabulary)
    packer = make_packer()
    found: list[int] = []
    first = 0
    while packer.epoch == 0:
        packed = packer.pack(4)
        assert packed is not None
        assert packed.tokens.shape == (4, 16)
        assert packed.valid.all()
        assert (packed.tokens[:, 0] == BOS).all()
        assert packed.first_sequence == first
        first += 4
        found += packed.tokens[:, 1:].reshape(-1).tolist()
    # The epoch's last sequence is filled up from its beginning, where the second epoch starts once more.
    twice = expected + expected[: -len(expected) % 15] + expected
    assert len(expected) % 15
    assert found == twice[: len(found)]
    assert packer.counts()["documents"] >= len(documents)


def test_every_epoch_has_the_same_sequences_and_ids(
    make_packer: Callable[..., Packer], documents: list[str], vocabulary: Vocabulary
) -> None:
    a_epoch = -(-len(reference(documents, vocabulary)) // 15)
    packed = make_packer().pack(3 * a_epoch)
    assert packed is not None
    tokens, ids = (np.split(value, 3) for value in (packed.tokens, packed.ids))
    for epoch in (1, 2):
        assert np.array_equal(tokens[epoch], tokens[0])
        assert np.array_equal(ids[epoch], ids[0])
    assert packed.ids.dtype == np.int64
    assert (packed.ids >= 0).all()
    assert len(set(ids[0].tolist())) == len(np.unique(tokens[0], axis=0))


def test_data_shorter_than_a_sequence_go_round_in_it(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": [5, 6, 1]}\n')
    packer = Packer(files(path, "text", "ids"), vocabulary, 9, True, lambda _: True)
    packed = packer.pack(2)
    assert packed is not None
    assert packed.tokens.tolist() == [[BOS, 5, 6, 1, 5, 6, 1, 5, 6]] * 2
    assert packed.ids[0] == packed.ids[1]


def test_ids_follow_from_the_tokens_alone() -> None:
    tokens = np.array([[1, 2, 3], [1, 2, 4], [1, 2, 3]])
    ids = sequence_ids(tokens)
    assert ids.dtype == np.int64
    assert ids[0] == ids[2] != ids[1]
    # The same on every machine and in every version: caches and checkpoints keep them.
    assert ids.tolist() == [6520558355739401531, 8265141577624745311, 6520558355739401531]


def test_the_cursor_of_a_very_long_document_stays_within_its_bound(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = tmp_path / "a.jsonl"
    length = 5 * RECORD_BLOCK_LENGTH // 2
    path.write_text(json.dumps({"ids": [5] * length}) + "\n")
    packer = Packer(files(path, "text", "ids"), vocabulary, 16, False, lambda _: True)
    for _ in range(length // (16 * 4096) + 3):
        packed = packer.pack(4096)
        assert packed is not None
        state = packer.state_dict()
        assert state["rest"].nbytes + state["head"].nbytes <= packer.state_bytes_at_most()
    # One document, whatever the number of its blocks.
    assert packer.counts()["documents"] == packer.epoch == 1


def test_without_bos_the_whole_sequence_is_text(
    make_packer: Callable[..., Packer], documents: list[str], vocabulary: Vocabulary
) -> None:
    packed = make_packer(prepend_bos=False).pack(3)
    assert packed is not None
    assert packed.tokens.reshape(-1).tolist() == reference(documents, vocabulary)[:48]


def test_one_pass_ends_in_padding_and_then_none(
    make_packer: Callable[..., Packer], documents: list[str], vocabulary: Vocabulary
) -> None:
    expected = reference(documents, vocabulary)
    packer = make_packer()
    found: list[int] = []
    while (packed := packer.pack(4, repeat=False)) is not None:
        assert (packed.tokens[~packed.valid] == PAD).all()
        found += packed.tokens[:, 1:][packed.valid[:, 1:]].tolist()
    assert found == expected
    assert packer.pack(4, repeat=False) is None


@pytest.mark.parametrize("stop", [0, 1, 7, 23])
def test_packing_goes_on_from_a_saved_cursor(make_packer: Callable[..., Packer], stop: int) -> None:
    packer = make_packer()
    for _ in range(stop):
        packer.pack(4)
    state = packer.state_dict()
    ids = {name: state.pop(name) for name in ("rest", "head")}
    state = {**json.loads(json.dumps(state)), **ids}
    again = make_packer()
    again.load_state_dict(state)
    for _ in range(40):
        expected, found = packer.pack(4), again.pack(4)
        assert expected is not None
        assert found is not None
        assert np.array_equal(expected.tokens, found.tokens)
        assert np.array_equal(expected.ids, found.ids)
        assert expected.first_sequence == found.first_sequence
        assert packer.counts() == again.counts()


def test_the_cursor_is_a_copy(make_packer: Callable[..., Packer]) -> None:
    packer = make_packer()
    packer.pack(2)
    state = packer.state_dict()
    before = state["rest"].clone()
    packer.pack(50)
    assert torch.equal(state["rest"], before)


def test_only_kept_documents_are_packed(make_packer: Callable[..., Packer], vocabulary: Vocabulary) -> None:
    packer = make_packer(keep=lambda document: document.index == 3)
    packed = packer.pack(1)
    assert packed is not None
    shown = "".join(vocabulary.decode_tokens(packed.tokens[0].tolist()))
    assert shown.startswith("<bos>3: ")


def test_an_epoch_without_a_usable_document_is_an_error(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' * 3)
    packer = Packer(files(path, "text", None), vocabulary, 16, True, lambda _: True)
    with pytest.raises(DataError, match="3 records were skipped"):
        packer.pack(1)


def test_tokenised_documents_keep_their_ids(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": [5, 6, 7]}\n{"ids": []}\n{"ids": [8, 1]}\n')
    packer = Packer(files(path, "text", "ids"), vocabulary, 8, True, lambda _: True)
    packed = packer.pack(1)
    assert packed is not None
    assert packed.tokens.tolist() == [[BOS, 5, 6, 7, EOS, 8, EOS, 5]]
    assert packer.counts()["skipped_documents"] == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("[5, 9999]", r"line 1: token ids must lie in \[0, \d+\).*9999"),
        ("[5, -3]", "has -3"),
        ("[5, 1.5]", "whole-number"),
        ('["a"]', "whole-number"),
        ("[[1, 2], [3]]", "whole-number"),
        ('"text"', "whole-number"),
        ("[true]", "whole-number"),
    ],
)
def test_bad_ids_are_an_error_that_names_the_document(
    tmp_path: Path, vocabulary: Vocabulary, ids: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": ' + ids + "}\n")
    packer = Packer(files(path, "text", "ids"), vocabulary, 8, True, lambda _: True)
    with pytest.raises(DataError, match=message):
        packer.pack(1)


def test_bos_is_asked_of_a_tokenizer_that_has_one(jsonl: Path) -> None:
    with pytest.raises(DataError, match="no BOS is known"):
        Packer(files(jsonl, "text", None), Vocabulary(None, 300), 16, True, lambda _: True)


def test_display_strings(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(Document(0, "", "the fox é")).tolist()
    shown = vocabulary.decode_tokens([BOS, *ids])
    assert len(shown) == len(ids) + 1
    assert shown[0] == "<bos>"
    assert "".join(shown[1:]).startswith("the fox")
    # Half a character has no text of its own; its bytes are shown.
    assert bytes_spelled("ĠÃ") == " <0xC3>"
    assert bytes_spelled("åĨĻæ") == "写<0xE6>"
    assert all(shown)
    assert Vocabulary(None, 300).decode_tokens([5, 7]) == ["5", "7"]
    assert vocabulary.decode_tokens([100_000]) == ["100000"]


def test_special_ids(vocabulary: Vocabulary) -> None:
    assert vocabulary.special_ids == [0, 1, 2, 3]
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (BOS, EOS, PAD)


def rows_packer(path: Path, vocabulary: Vocabulary, rows: list[list[int]], prepend_bos: bool = True) -> Packer:
    path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    return Packer(files(path, "text", "ids"), vocabulary, 6, prepend_bos, lambda _: True, rows=True)


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_kept_rows_are_sequences(
    tmp_path: Path, vocabulary: Vocabulary, prepend_bos: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        [BOS, 5, 6, 7, 8, 9],
        [5, 6, 7, PAD, PAD],
        [BOS, 5],
        [PAD, PAD, 8, 9],
        [],
        [PAD, PAD],
        [5, 6, 7, 8, 9, 10, 11],
    ]
    packer = rows_packer(tmp_path / "a.jsonl", vocabulary, rows, prepend_bos)
    packed = packer.pack(9)
    assert packed is not None
    bos = [BOS] if prepend_bos else []
    whole = [[BOS, 5, 6, 7, 8, 9], [*bos, 5, 6, 7], [BOS, 5], [*bos, 8, 9], [*bos, 5, 6, 7, 8, 9, 10][:6]]
    found = [tokens[valid].tolist() for tokens, valid in zip(packed.tokens, packed.valid, strict=True)]
    assert found == (whole * 2)[:9]
    assert (packed.tokens[~packed.valid] == PAD).all()
    assert packed.documents[:5].max(1).tolist() == [0, 1, 2, 3, 6]
    assert (packed.documents[~packed.valid] == -1).all()
    assert packer.counts()["cut_rows"] == 1
    assert "rows of more than sequence_length = 6 tokens are cut" in caplog.text
    once = rows_packer(tmp_path / "b.jsonl", vocabulary, rows, prepend_bos)
    first, last = once.pack(4, repeat=False), once.pack(4, repeat=False)
    assert first is not None
    assert last is not None
    assert (len(first.tokens), len(last.tokens), once.pack(4, repeat=False)) == (4, 1, None)


def test_kept_rows_go_on_from_a_saved_cursor(tmp_path: Path, vocabulary: Vocabulary) -> None:
    rows = [[5 + n, 6, 7 + n] for n in range(7)]
    packer = rows_packer(tmp_path / "a.jsonl", vocabulary, rows)
    packer.pack(3)
    again = rows_packer(tmp_path / "a.jsonl", vocabulary, rows)
    again.load_state_dict(packer.state_dict())
    for _ in range(6):
        a, b = packer.pack(3), again.pack(3)
        assert a is not None
        assert b is not None
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.documents, b.documents)
    assert packer.counts() == again.counts()


def test_each_token_knows_its_document(
    make_packer: Callable[..., Packer], vocabulary: Vocabulary, documents: list[str]
) -> None:
    packer = make_packer()
    pieces: dict[int, list[int]] = {}
    while packer.epoch < 1:
        packed = packer.pack(3)
        assert packed is not None
        for token, document in zip(packed.tokens[:, 1:].ravel(), packed.documents[:, 1:].ravel(), strict=True):
            pieces.setdefault(int(document), []).append(int(token))
        assert (packed.documents[:, 0] == packed.documents[:, 1]).all()
    for index in range(20, 60):
        assert pieces[index] == [*vocabulary.encode(Document(index, "", documents[index])).tolist(), EOS]


def test_padding_at_the_ends_of_lists_is_left_out(vocabulary: Vocabulary) -> None:
    def ids(*given: int) -> list[int]:
        return vocabulary.encode(Document(0, "", list(given))).tolist()

    assert ids(PAD, PAD, 5, PAD, 6, PAD) == [5, PAD, 6]
    with pytest.raises(Unusable, match="only padding"):
        ids(PAD, PAD)
    vocabulary = Vocabulary(None, 300)
    assert ids(PAD, 5) == [PAD, 5]
    vocabulary.pad_id = vocabulary.eos_id = 1
    assert ids(5, 1, 6, 1, 1, 1) == [5, 1, 6, 1]
    assert ids(1, 1, 5) == [1, 5]


def test_special_ids_that_the_model_does_not_embed_are_not_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"ids": [3, 4, 9, 9]}\n{"ids": [5]}\n')
    vocabulary = Vocabulary(None, 9)
    vocabulary.bos_id, vocabulary.pad_id, vocabulary.eos_id = 2, 9, 10
    for rows in (False, True):
        packed = Packer(files(tmp_path, "text", "ids"), vocabulary, 8, True, lambda _: True, rows=rows).pack(
            2, repeat=False
        )
        assert packed is not None
        assert packed.tokens.tolist() == (
            [[2, 3, 4, 0, 0, 0, 0, 0], [2, 5, 0, 0, 0, 0, 0, 0]] if rows else [[2, 3, 4, 2, 5, 2, 0, 0]]
        )


def test_a_second_bos_is_warned_of_once(
    tmp_path: Path, vocabulary: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"ids": [{BOS}, 5]}}\n' * 3)
    source = files(tmp_path, "text", "ids")
    for rows, prepend in ((True, True), (False, False)):
        Packer(source, vocabulary, 4, prepend, lambda _: True, rows=rows).pack(3, repeat=False)
    assert not caplog.text
    Packer(source, vocabulary, 4, True, lambda _: True).pack(3, repeat=False)
    assert caplog.text.count("begins with BOS already") == 1


def test_a_bos_that_stands_in_is_refused_unless_allowed(jsonl: Path, hooked: HookedModel) -> None:
    tokenizer = hooked._bridge.tokenizer
    stand_in = Vocabulary(tokenizer, 300, bos_stands_in=True)
    with pytest.raises(DataError, match=r"no BOS token; set it to false, or activations\.eos_as_bos to true"):
        Packer(files(jsonl, "text", None), stand_in, 16, True, lambda _: True)
    assert Packer(files(jsonl, "text", None), stand_in, 16, True, lambda _: True, eos_as_bos=True).pack(1) is not None


def test_a_tokenizer_of_another_model_is_refused(hooked: HookedModel, caplog: pytest.LogCaptureFixture) -> None:
    import copy

    tokenizer = copy.deepcopy(hooked._bridge.tokenizer)
    size = len(tokenizer)
    Vocabulary(tokenizer, size).check()
    with pytest.raises(DataError, match="not this model's tokenizer"):
        Vocabulary(tokenizer, size - 3).check()
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    assert not caplog.text
    Vocabulary(tokenizer, size).check()
    assert "1 added tokens that the model does not embed, such as '<extra>'" in caplog.text
    caplog.clear()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    Vocabulary(tokenizer, size).check()
    assert f"EOS '<end>' is id {size + 1} and the model embeds {size}: documents are separated by BOS" in caplog.text
