"""Calibration text: specs, records, windows, padding, and text sampled from the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_model
from tokenizers.processors import TemplateProcessing

from care_mla.errors import CalibrationError, ConfigError
from care_mla.healing.text import collect_blocks
from care_mla.text import load_text, make_windows
from care_mla.text.documents import load_documents
from care_mla.text.packing import random_windows
from care_mla.text.specs import parse_spec, share
from care_mla.text.tokens import leading_bos

TOKENIZER = byte_tokenizer()


def _spec(spec: str) -> list[tuple[str, float]]:
    return [(part.name, part.weight) for part in parse_spec(spec)]


def test_specs() -> None:
    assert _spec("alpaca") == [("alpaca", 1.0)]
    assert _spec("alpaca:0.5,file.jsonl:0.5") == [("alpaca", 0.5), ("file.jsonl", 0.5)]
    assert _spec("a.txt:3,b.txt") == [("a.txt", 0.75), ("b.txt", 0.25)]
    assert _spec("C:\\texts\\a.txt") == [("C:\\texts\\a.txt", 1.0)]


def test_files_with_commas_and_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists is a file, whatever its name looks like."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c:0.5", "d.txt", "e, f,g.txt", "1:2,3.txt"):
        Path(name).write_text("text")
    assert _spec("a,b.txt") == [("a,b.txt", 1.0)]
    assert _spec("c:0.5") == [("c:0.5", 1.0)]
    assert _spec("a,b.txt:3,d.txt:1") == [("a,b.txt", 0.75), ("d.txt", 0.25)]
    assert _spec("d.txt, e, f,g.txt:1,self:2") == [("d.txt", 0.25), ("e, f,g.txt", 0.25), ("self", 0.5)]
    assert _spec("1:2,3.txt") == [("1:2,3.txt", 1.0)]
    assert _spec("c:0.5:2,d.txt:2") == [("c:0.5", 0.5), ("d.txt", 0.5)]


def test_weights_of_any_size() -> None:
    assert _spec("a:1e308,b:1e308") == [("a", 0.5), ("b", 0.5)]


@pytest.mark.parametrize(
    "spec", ["", " ", ",", "a,", "a,,b", "a:0", "a:-1", ":0.5", " :1", "a:nan", "a:inf", "a:-inf", "a:1e999"]
)
def test_bad_specs(spec: str) -> None:
    with pytest.raises(ConfigError, match="NAME:WEIGHT"):
        parse_spec(spec)


def test_a_corpus_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text " * 50)
    for spec in ("a.txt,a.txt", f"a.txt:2,copy,{tmp_path}/a.txt", "copy,copy:3"):
        with pytest.raises(ConfigError, match="twice; name it once, with the sum of the weights"):
            make_windows(spec, TOKENIZER, samples=4, seqlen=8, seed=0)


@pytest.mark.parametrize("weights", [[0.97, 0.01, 0.01, 0.01], [0.5, 0.5], [0.9, 0.1], [0.98, 0.005, 0.005, 0.01]])
def test_shares_add_up(weights: list[float]) -> None:
    """Also where the smallest get one although their weights are less."""
    for total in (len(weights), 7, 128):
        counts = share(total, weights)
        assert sum(counts) == total and min(counts) >= 1


def test_records(tmp_path: Path) -> None:
    lines = tmp_path / "r.jsonl"
    lines.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert load_documents(str(lines)) == ["one", "two"]
    alpaca = tmp_path / "a.json"
    alpaca.write_text(json.dumps([{"instruction": "say", "input": "", "output": "hi"}]))
    assert load_text(str(alpaca)) == "say\nhi"
    assert load_text(str(alpaca), field="output") == "hi"
    with pytest.raises(CalibrationError, match="no field 'body'; it has instruction, input, output"):
        load_text(str(alpaca), field="body")
    other = tmp_path / "o.json"
    other.write_text('[{"q": "a"}]')
    with pytest.raises(CalibrationError, match="choose with --field"):
        load_text(str(other))


def test_unusable_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "x.csv").write_text("a,b")
    for name, message in (
        ("empty.txt", "holds no text"),
        ("bad.jsonl", "not valid JSONL"),
        ("latin.txt", "not UTF-8"),
        ("x.csv", "text files are"),
        ("absent.txt", "neither a file nor"),
    ):
        with pytest.raises(CalibrationError, match=message):
            load_text(str(tmp_path / name))


def test_windows_follow_the_reference_protocol(text_file: Path) -> None:
    """Starts drawn by torch.randint(0, len - seqlen, (samples,)) from the seed: the protocol of the published numbers."""
    tokens = TOKENIZER(text_file.read_text(), return_tensors="pt").input_ids[0]
    starts = torch.randint(0, len(tokens) - 32, (5,), generator=torch.Generator().manual_seed(42)).tolist()
    windows = make_windows(str(text_file), TOKENIZER, samples=5, seqlen=32, seed=42)
    assert torch.equal(windows.input_ids, torch.stack([tokens[s : s + 32] for s in starts]))
    assert windows.num_tokens == 160 and bool((windows.weights == 1).all())


def test_too_short_text(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(CalibrationError, match="has 5 tokens, one window needs more than 32"):
        make_windows(str(tmp_path / "short.txt"), TOKENIZER, samples=1, seqlen=32, seed=0)


def test_bos_opens_every_window() -> None:
    windows = random_windows(torch.arange(100), 3, 8, 0, bos=7)
    assert windows.shape == (3, 8) and bool((windows[:, 0] == 7).all())
    assert leading_bos(TOKENIZER) is None


def test_documents_are_padded_and_padding_weighs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "abcdefghij"}\n')
    windows = make_windows(str(path), TOKENIZER, samples=4, seqlen=6, seed=0, pack=False)
    assert sorted(windows.lengths.tolist()) == [3, 6]
    (batch,) = windows.batches(8)
    assert torch.equal(batch.token_weight > 0, batch.attention_mask.bool())
    assert int(batch.attention_mask.sum()) == windows.num_tokens == 9


def test_mix_weights_are_exact(tmp_path: Path) -> None:
    """Shares of the total weight are the asked ones although documents differ in length."""
    for name, text in (("a", "xy"), ("b", "abcdefghijkl")):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * 10)
    windows = make_windows(
        f"{tmp_path}/a.jsonl:0.25,{tmp_path}/b.jsonl:0.75", TOKENIZER, samples=8, seqlen=10, seed=0, pack=False
    )
    weight = windows.lengths * windows.weights
    short = windows.lengths == 2
    assert int(short.sum()) == 2
    assert float(weight[short].sum() / weight.sum()) == pytest.approx(0.25)
    assert float(weight.sum()) == pytest.approx(windows.num_tokens)


def test_more_corpora_than_samples(text_file: Path) -> None:
    with pytest.raises(ConfigError, match="less than one for each"):
        make_windows(f"{text_file},{text_file}", TOKENIZER, samples=1, seqlen=8, seed=0)


def test_self_sampling_is_deterministic_full_and_without_special_tokens() -> None:
    model = tiny_model("llama")
    samples = [make_windows("self", TOKENIZER, samples=5, seqlen=16, seed=s, model=model).input_ids for s in (3, 3, 4)]
    assert (
        samples[0].shape == (5, 16) and torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    )
    assert int(samples[0].min()) > 2


def test_self_needs_the_model() -> None:
    with pytest.raises(ConfigError, match="model itself"):
        make_windows("self", TOKENIZER, samples=1, seqlen=8, seed=0)


def test_copy_says_random_strings_twice() -> None:
    mixed = make_windows("copy", TOKENIZER, samples=3, seqlen=17, seed=0)
    body = mixed.input_ids
    assert body.shape == (3, 17) and mixed.lengths.tolist() == [17] * 3
    assert torch.equal(body[:, :8], body[:, 9:]) and not torch.equal(body[0], body[1])
    assert not set(TOKENIZER.all_special_ids) & set(body.flatten().tolist())


def test_fewer_documents_than_asked_are_said(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "abc"}\n{"text": null}\n{"text": "def"}\n')
    windows = make_windows(f"{path},copy", TOKENIZER, samples=8, seqlen=6, seed=0, pack=False)
    assert len(windows) == 6
    (note,) = windows.notes
    assert note.startswith(f"{path} gave 2 documents, fewer than the 4 windows asked of it")
    assert not make_windows(str(path), TOKENIZER, samples=2, seqlen=6, seed=0, pack=False).notes


def test_a_bos_that_a_template_wrote_is_not_doubled(tmp_path: Path) -> None:
    """Documents of chats begin with the BOS that their template writes."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    assert leading_bos(tokenizer) == 0
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "<bos>abc"}\n')
    windows = make_windows(str(path), tokenizer, samples=1, seqlen=8, seed=0, pack=False)
    assert windows.lengths.tolist() == [4] and windows.input_ids[0].tolist().count(0) == 1
    blocks = collect_blocks(str(path), tokenizer, count=1, seqlen=5, seed=0)
    assert blocks.input_ids[0].tolist().count(0) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sampling_from_damaged_weights(value: float) -> None:
    """The weight is named, where torch says that probabilities are negative."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = value
    with pytest.raises(
        CalibrationError, match=r"layers\.1\.mlp\.down_proj\.weight is not finite in float32: the checkpoint"
    ):
        make_windows("self", TOKENIZER, samples=2, seqlen=8, seed=0, model=model)


def test_sampling_where_a_dtype_overflows() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("lm_head").weight *= 1e6
    model = model.to(torch.float16)
    with pytest.raises(CalibrationError, match=r"lm_head\.weight is not finite in float16: float16 is too narrow"):
        make_windows("self", TOKENIZER, samples=2, seqlen=8, seed=0, model=model)
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("lm_head").weight *= 3e4
    with pytest.raises(CalibrationError, match="logits are not finite in float16 though its weights are: float16"):
        make_windows("self", TOKENIZER, samples=2, seqlen=8, seed=0, model=model.to(torch.float16))
