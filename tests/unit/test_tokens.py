"""Tokens and windows of long texts: the same as of the whole text, in memory that does not grow with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from care_mla.errors import CalibrationError, CheckpointError
from care_mla.evaluation import evaluation_windows
from care_mla.healing.text import collect_blocks
from care_mla.text import embedding_rows, load_tokenizer, make_windows, packing, tokens
from care_mla.text.packing import stretches
from care_mla.text.tokens import all_tokens, first_tokens, require_embedded, tokenize

ODD = ["\U0001f600", "é", "₂₂", "\u2028", " ", "  ", "\n\n\n", "aaaa", "日本語", "12345", "don't", "word", "x" * 50]


def _odd_text(pieces: int) -> str:
    chosen = torch.randint(0, len(ODD), (pieces,), generator=torch.Generator().manual_seed(0))
    return "".join(ODD[i] for i in chosen.tolist())


def _merging() -> PreTrainedTokenizerFast:
    """Writes a mark before the text and merges across words, as Llama 2 does: what it makes depends on where a text is cut."""
    letters = ["▁", *"abdinortwx", "'"]
    merges = [
        ("▁", "w"),
        ("o", "r"),
        ("or", "d"),
        ("▁w", "ord"),
        ("▁", "▁"),
        ("a", "a"),
        ("aa", "aa"),
        ("d", "▁"),
        ("x", "x"),
    ]
    merged = [a + b for a, b in merges]
    vocabulary = {symbol: i for i, symbol in enumerate(["<unk>", *letters, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _words() -> PreTrainedTokenizerFast:
    """Whole words, most of them unknown."""
    tokenizer = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "word": 1, "aaaa": 2, "line": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_tokenizer, _merging, _words])
@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_tokens_of_a_text_in_pieces(
    make: Callable[[], PreTrainedTokenizerFast], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are joined without a trace."""
    monkeypatch.setattr(tokens, "BLOCK", 4096)
    tokenizer, text = make(), _odd_text(12_000)
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    whole = tokenize(tokenizer, text)
    assert torch.equal(all_tokens(tokenizer, pieces).long(), whole)
    some, complete = first_tokens(tokenizer, iter(pieces), 10_000)
    assert torch.equal(some, whole[:10_000]) and complete == (len(whole) <= 10_000)


def test_real_text_has_the_tokens_it_always_had(real_model: Path, shared_data: Path) -> None:
    """Windows of calibration and evaluation are those of the text tokenized whole, as in all published numbers."""
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    path = shared_data / "wikitext2" / "valid.tokens.txt"
    whole = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    starts = torch.randint(0, len(whole) - 256, (128,), generator=torch.Generator().manual_seed(42)).tolist()
    windows = make_windows(str(path), tokenizer, samples=128, seqlen=256, seed=42)
    assert torch.equal(windows.input_ids, torch.stack([whole[start : start + 256] for start in starts]))
    with path.open(encoding="utf-8") as lines:
        rows = evaluation_windows(tokenizer, lines, seqlen=512, windows=80)
        assert len(lines.read()) > path.stat().st_size / 2  # what was not needed
    assert torch.equal(rows, whole[: 80 * 512].view(80, 512))


def test_text_that_no_cut_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One word of many blocks: other tokens than of the whole, but all of the text and none of it twice."""
    monkeypatch.setattr(tokens, "BLOCK", 4096)
    assert all_tokens(_merging(), ["a" * 50_003]).tolist() == tokenize(_merging(), "a" * 50_003).tolist()
    assert 1 <= len(all_tokens(_words(), ["y" * 50_000])) <= 50_000 // 4096 + 1
    tokenizer = _merging()
    text = "x" * 50_001
    assert tokenizer.decode(all_tokens(tokenizer, [text]).tolist()).replace(" ", "").strip("▁") == text


def test_a_tokenizer_without_offsets_is_cut_at_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BLOCK", 4096)
    tokenizer, text = byte_tokenizer(), _odd_text(6000)
    whole = tokenize(tokenizer, text)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert torch.equal(all_tokens(tokenizer, [text]).long(), whole)


def test_a_long_text_is_sampled_by_its_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a length, windows begin at any character: pieces of the text, spread over it, the same for a seed."""
    monkeypatch.setattr(packing, "EXACT_CHARACTERS", 1000)
    text = "".join(f"<{i:05}>" for i in range(9000))
    (tmp_path / "t.txt").write_text(text)
    first, again, other = (
        make_windows(str(tmp_path / "t.txt"), byte_tokenizer(), samples=200, seqlen=64, seed=seed).input_ids
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    begins = torch.tensor([text.index(byte_tokenizer().decode(row)) for row in first]).double() / len(text)
    assert float(begins.min()) < 0.03 and float(begins.max()) > 0.97
    assert float(begins.mean()) == pytest.approx(0.5, abs=0.07) and float(begins.std()) == pytest.approx(
        0.289, abs=0.04
    )


def test_long_tokens_make_the_stretches_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "EXACT_CHARACTERS", 1000)
    line = "word " + "y" * 150 + " line "
    (tmp_path / "t.txt").write_text(line * 200)
    windows = make_windows(str(tmp_path / "t.txt"), _words(), samples=20, seqlen=32, seed=0).input_ids
    assert {row.tolist()[0] for row in windows} <= {0, 1, 3} and windows.shape == (20, 32)
    (tmp_path / "short.txt").write_text(line * 9)
    with pytest.raises(CalibrationError, match="has 27 tokens, one window needs more than"):
        make_windows(str(tmp_path / "short.txt"), _words(), samples=2, seqlen=32, seed=0)


def test_stretches_of_a_text_in_pieces() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    pieces = [text[i : i + 7] for i in range(0, 1000, 7)]
    begins = [900, 3, 3, 0, 500, 503]
    assert stretches(pieces, begins, 20) == [text[begin : begin + 20] for begin in begins]


MEASURED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_tokens import _words
from care_mla.text import joined, make_windows, stream_documents
from care_mla.evaluation import evaluation_windows
from care_mla.healing.text import collect_blocks

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

tokenizer, before = _words(), peak()
for name in ("t.txt", "r.jsonl", "r.json"):
    make_windows(name, tokenizer, samples=8, seqlen=32, seed=0, pack=name == "t.txt")
    evaluation_windows(tokenizer, joined(stream_documents(name)), seqlen=64, windows=4)
    collect_blocks(name, tokenizer, count=8, seqlen=64, seed=0)
exact = peak()
make_windows("long.txt", tokenizer, samples=8, seqlen=32, seed=0)
print(exact - before, peak() - before)
"""


def test_memory_is_bounded_by_what_is_asked_for(tmp_path: Path) -> None:
    """12 MB in every format, and 60 MB, cost less than 150 MB; 10 MB cost 1.4 GB before."""
    line = "line " + "y" * 80 + " word"
    (tmp_path / "t.txt").write_text(f"{line}\n" * (12_000_000 // (len(line) + 1)))
    record = json.dumps({"text": line})
    count = 12_000_000 // len(record)
    (tmp_path / "r.jsonl").write_text(f"{record}\n" * count)
    (tmp_path / "r.json").write_text("[" + ",".join([record] * count) + "]")
    with (tmp_path / "long.txt").open("w") as file:
        for _ in range(60):
            file.write(f"{line}\n" * (1_000_000 // (len(line) + 1)))
    script = MEASURED.format(tests=str(Path(__file__).parent))
    path = [str(Path(__file__).parents[1]), str(Path(tokens.__file__).parents[2])]
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(path), "PATH": "", "HOME": str(tmp_path), "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    exact, scattered = map(float, ran.stdout.split()[-2:])
    assert exact < 150 and scattered < 150


def test_blocks_are_cut_from_the_first_text_alone(tmp_path: Path) -> None:
    """Healing reads a long document as far as its blocks need, and marks its end only where it ends."""
    (tmp_path / "t.txt").write_text("word " * 1000)
    blocks = collect_blocks(str(tmp_path / "t.txt"), byte_tokenizer(), count=3, seqlen=16, seed=0)
    assert len(blocks) == 3 and 1 not in blocks.input_ids
    (tmp_path / "s.txt").write_text("w" * 47)
    whole = collect_blocks(str(tmp_path / "s.txt"), byte_tokenizer(), count=9, seqlen=16, seed=0)
    assert len(whole) == 3 and int(whole.input_ids[2, -1]) == 1


def test_tokens_without_an_embedding(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """A tokenizer may be larger than the embedding as long as the text keeps below it; padding and drawn tokens do."""
    rows = embedding_rows(tiny())
    assert rows == 300
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{i:03}" for i in range(100)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert len(tokenizer) > rows and tokenizer.pad_token_id >= rows
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "short"}\n')
    windows = make_windows(str(path), tokenizer, samples=1, seqlen=32, seed=0, pack=False, vocabulary=rows)
    assert int(windows.input_ids.max()) < rows and windows.num_tokens == 5
    drawn = make_windows("copy", tokenizer, samples=50, seqlen=64, seed=0, vocabulary=rows)
    assert int(drawn.input_ids.max()) < rows
    path.write_text('{"text": "short word099"}\n')
    for refused in (
        lambda: make_windows(str(path), tokenizer, samples=1, seqlen=32, seed=0, pack=False, vocabulary=rows),
        lambda: evaluation_windows(tokenizer, "short word099", seqlen=7, windows=1, vocabulary=rows),
        lambda: collect_blocks(str(path), tokenizer, count=1, seqlen=7, seed=0, vocabulary=rows),
    ):
        with pytest.raises(CalibrationError, match=r"'word099'\) has no embedding: the tokenizer knows 360 tokens"):
            refused()
    require_embedded(torch.tensor([299]), tokenizer, rows, "text")


def test_a_tokenizer_of_special_tokens_alone(tmp_path: Path) -> None:
    empty = Tokenizer(models.BPE(vocab={"<pad>": 0}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>")
    with pytest.raises(CalibrationError, match="no ordinary token"):
        make_windows("copy", tokenizer, samples=1, seqlen=8, seed=0)
    with pytest.raises(CalibrationError, match="no token of the evaluation text"):
        evaluation_windows(tokenizer, "text", seqlen=2, windows=1)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="all of them special"):
        load_tokenizer(tmp_path)
