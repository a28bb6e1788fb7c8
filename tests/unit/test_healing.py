"""Losses against plain autograd, packed text against documents alone, and what a pupil trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, byte_tokenizer, tiny_model
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

import care_mla
from care_mla.checkpoint import CheckpointReader
from care_mla.config import HealSettings
from care_mla.errors import CalibrationError, CheckpointError, ConfigError, HealingError
from care_mla.families import get_family
from care_mla.healing.blocks import Blocks, Order, held_out, pack, packed_inputs
from care_mla.healing.distillation import Distillation
from care_mla.healing.losses import CHUNK, IGNORED, TopTarget, losses, next_tokens, top_target
from care_mla.healing.pair import open_pair
from care_mla.healing.state import Progress, RunState
from care_mla.healing.student import STOCK, Pupil, family_of, make_pupil, set_trained, share_teacher
from care_mla.healing.text import collect_blocks
from care_mla.names import Trained

TOKENS, VOCABULARY = 2 * CHUNK + 44, 50


@pytest.fixture
def logits() -> Tensor:
    return (3.0 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1))).requires_grad_()


@pytest.fixture
def teacher() -> Tensor:
    return 3.0 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def labels() -> Tensor:
    """A third of them predict nothing."""
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))
    return labels.masked_fill(torch.arange(TOKENS) % 3 == 0, IGNORED)


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def _kl(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(teacher || student), Eq. 7-8."""
    p, q = (teacher / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    return temperature**2 * kl_div(q, p, log_target=True, reduction="sum")


@pytest.mark.parametrize(
    ("kl_weight", "ce_weight", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.3, 2.0), (1.0, 2.0, 0.5)]
)
def test_losses_and_gradients_are_those_of_the_paper(
    kl_weight: float, ce_weight: float, temperature: float, logits: Tensor, teacher: Tensor, labels: Tensor
) -> None:
    kl = _kl(logits, teacher, temperature)
    ce = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    expected = kl_weight * kl + ce_weight * ce
    found = losses(
        logits, labels, teacher, kl_weight=kl_weight, ce_weight=ce_weight, temperature=temperature, with_ce=True
    )
    torch.testing.assert_close(found, torch.stack([expected, kl, ce]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(_gradient(3 * found[0], logits), 3 * _gradient(expected, logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("count", [1, 5, VOCABULARY - 1, VOCABULARY, VOCABULARY + 9])
def test_first_tokens_of_the_teacher(
    count: int, temperature: float, logits: Tensor, teacher: Tensor, labels: Tensor
) -> None:
    """KL between k tokens and one class of all others; at k = V the whole KL."""
    weights = {"kl_weight": 1.0, "ce_weight": 0.0, "temperature": temperature}
    found = losses(logits, labels, top_target(teacher, count, temperature), **weights)[0]
    whole = _kl(logits, teacher, temperature)
    if count >= VOCABULARY:
        expected = whole
    else:
        first = torch.zeros(TOKENS, VOCABULARY, dtype=torch.bool).scatter(-1, teacher.topk(count, -1).indices, True)
        p, q = ((values / temperature).softmax(-1) for values in (teacher, logits))
        p_all, q_all = (
            torch.cat([x[first].view(TOKENS, count), x[~first].view(TOKENS, -1).sum(-1, keepdim=True)], -1)
            for x in (p, q)
        )
        expected = temperature**2 * (p_all * (p_all.log() - q_all.log())).sum()
        assert 0 < found < whole + 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(_gradient(found, logits), _gradient(expected, logits), rtol=1e-3, atol=1e-4)


def test_a_teacher_that_is_certain_has_finite_gradients(logits: Tensor, labels: Tensor) -> None:
    """Nothing is left for the class of all others."""
    certain = TopTarget(torch.zeros(TOKENS, 1), torch.zeros(TOKENS, 1, dtype=torch.long))
    loss = losses(logits, labels, certain, kl_weight=1.0, ce_weight=0.0, temperature=1.0)[0]
    expected = cross_entropy(logits, torch.zeros(TOKENS, dtype=torch.long), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(_gradient(loss, logits), _gradient(expected, logits), rtol=0, atol=1e-3)


def test_nothing_to_predict_is_nothing_to_learn(logits: Tensor) -> None:
    none = torch.full((TOKENS,), IGNORED)
    loss, kl, ce = losses(logits, none, None, kl_weight=1.0, ce_weight=1.0, temperature=1.0)
    assert loss == kl == ce == 0
    assert not _gradient(loss, logits).any()


# --- packing ----------------------------------------------------------------------------------------------------------

DOCUMENTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)) for n in (13, 1, 9, 30, 7)]
SEQLEN = 16


def test_packed_documents_are_joined_and_start_anew() -> None:
    blocks = pack(DOCUMENTS, SEQLEN, 99)
    assert blocks.num_tokens == SEQLEN * len(blocks) == 48  # 60 tokens, and the rest fills no block
    assert torch.equal(blocks.input_ids.flatten().long(), torch.cat(DOCUMENTS)[:48])
    assert blocks.positions[0].tolist() == [*range(13), 0, 0, 1]
    assert blocks.positions[1].tolist() == [*range(7), *range(9)]
    assert blocks.positions[2].tolist() == [*range(16)]
    assert torch.equal(pack(DOCUMENTS, SEQLEN, 2).input_ids, blocks.input_ids[:2])
    labels = next_tokens(blocks.input_ids, blocks.positions)
    assert (labels[0] == IGNORED).nonzero().flatten().tolist() == [12, 13, 15]
    assert torch.equal(labels[2, :-1], blocks.input_ids[2, 1:])


def test_no_more_documents_are_read_than_needed() -> None:
    documents = iter([*DOCUMENTS, *DOCUMENTS])
    pack(documents, SEQLEN, 2)
    assert len(list(documents)) == 6


@torch.no_grad()
def _assert_documents_are_apart(model: PreTrainedModel) -> None:
    blocks = pack(DOCUMENTS, SEQLEN, 3)
    ids, positions = blocks.input_ids.long(), blocks.positions.long()
    config = model.config.get_text_config().to_dict()
    family = STOCK if "kv_lora_rank" in config else get_family(config)
    packed = model(**packed_inputs(model, family, ids, positions)).logits
    for row in range(len(ids)):
        starts = (positions[row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], SEQLEN], strict=True):
            alone = model(input_ids=ids[row : row + 1, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[row, start:end], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(TINY))
def test_documents_are_apart_in_sources(name: str) -> None:
    _assert_documents_are_apart(tiny_model(name))


@pytest.mark.parametrize("kind", ["joint", "split", "mla", "stock"])
@pytest.mark.parametrize("training", [False, True])
def test_documents_are_apart_in_converted_models(kind: str, training: bool, converted: Callable[[str], Path]) -> None:
    _assert_documents_are_apart(_pupil(converted(kind)).model if training else care_mla.load(converted(kind)))


def test_order_is_a_permutation_an_epoch_by_seed_and_step() -> None:
    order = Order(num_blocks=10, batch_size=4, seed=3)
    read = torch.cat([order.rows(step) for step in range(10)])
    epochs = read.view(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(order.rows(7), read[28:32])
    assert not torch.equal(Order(10, 4, seed=4).rows(0), read[:4])
    larger_than_the_text = Order(num_blocks=3, batch_size=6, seed=0).rows(1)
    assert sorted(larger_than_the_text.tolist()) == [0, 0, 1, 1, 2, 2]


def test_held_out_text_is_not_trained_on() -> None:
    blocks = Blocks(torch.arange(12).view(12, 1), torch.zeros(12, 1, dtype=torch.long))
    train, evaluation = held_out(blocks, 3, seed=1)
    assert len(evaluation) == 3
    assert sorted([*train.input_ids.flatten().tolist(), *evaluation.input_ids.flatten().tolist()]) == list(range(12))
    assert torch.equal(held_out(blocks, 3, seed=1)[1].input_ids, evaluation.input_ids)
    with pytest.raises(CalibrationError, match="12 are held out"):
        held_out(blocks, 12, seed=1)


def test_a_mix_shares_blocks_out(text_file: Path) -> None:
    blocks = collect_blocks(f"copy:0.25,{text_file}:0.75", byte_tokenizer(), count=8, seqlen=SEQLEN, seed=0)
    assert len(blocks) == 8
    first, second = blocks.input_ids[:2].split(SEQLEN // 2, dim=1)
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="--tokens"):
        collect_blocks("copy:0.5,self:0.5", byte_tokenizer(), count=1, seqlen=SEQLEN, seed=0)


# --- pupil ------------------------------------------------------------------------------------------------------------

IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.arange(24).expand(2, -1)


def _pupil(directory: Path) -> Pupil:
    family, inner = family_of(CheckpointReader(directory).config)
    return make_pupil(care_mla.load(directory, dtype=torch.float32), family, inner=inner)


def _share(pupil: Pupil, own: Path, source: Path, trained: Trained = "kv") -> bool:
    return share_teacher(pupil, CheckpointReader(own), CheckpointReader(source), trained)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["joint", "split", "mla"])
def test_one_model_holds_student_and_teacher(kind: str, converted: Callable[[str], Path]) -> None:
    pupil, source = _pupil(converted(kind)), converted("source")
    assert _share(pupil, converted(kind), source)
    both = Distillation(pupil, None, HealSettings())
    assert torch.equal(both.teacher_logits(IDS, POSITIONS), care_mla.load(source)(IDS).logits.flatten(0, 1))
    own = care_mla.load(converted(kind))(IDS).logits
    torch.testing.assert_close(pupil.model(IDS, use_cache=False).logits, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(name for name in TINY if "-" not in name))
def test_every_family_shares_its_teacher(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """One model holds both, attention stays within documents, and every factor gets a gradient."""
    source, text = tiny(family), {"calibration": "copy", "samples": 2, "seqlen": 16}
    care_mla.convert(source, tmp_path / "out", calibration=text, rank=8, method="svd", ranks="uniform", refit=False)
    pupil = _pupil(tmp_path / "out")
    assert _share(pupil, tmp_path / "out", source)
    set_trained(pupil, "kv")
    both = Distillation(pupil, None, HealSettings())
    expected = care_mla.load(source)(**packed_inputs(pupil.model, pupil.family, IDS, POSITIONS)).logits
    assert torch.equal(both.teacher_logits(IDS, POSITIONS), expected.flatten(0, 1))
    _assert_documents_are_apart(pupil.model)
    both(IDS, POSITIONS, None, None, False)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in pupil.model.parameters() if p.requires_grad)


def test_weights_that_differ_need_a_teacher_of_its_own(
    converted: Callable[[str], Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    joint, stock = converted("joint"), converted("stock")
    assert not _share(_pupil(joint), joint, tiny("llama", num_hidden_layers=2, seed=1))
    assert not _share(_pupil(joint), joint, tiny("llama", num_hidden_layers=3, directory=tmp_path / "deeper"))
    assert not _share(_pupil(joint), joint, converted("source"), "all")
    assert not _share(_pupil(stock), stock, converted("source"))


def test_a_teacher_stored_without_prefix_is_shared(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """As `LlamaModel.save_pretrained` writes it."""
    source = tiny("llama", num_hidden_layers=2, tie_word_embeddings=True)
    path = source / "model.safetensors"
    save_file({name.removeprefix("model."): t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    text = {"calibration": "copy", "samples": 2, "seqlen": 16}
    care_mla.convert(source, tmp_path / "out", calibration=text, rank=8, method="svd", ranks="uniform")
    pair = open_pair(tmp_path / "out", None, None)
    assert share_teacher(_pupil(pair.directory), pair.reader, pair.teacher, "kv")
    assert pair.teacher.fingerprint == CheckpointReader(source).fingerprint


FACTORS = {
    "joint": {"kv_a_proj", "k_b_proj", "v_b_proj"},
    "split": {"kv_a_proj", "k_b_proj", "v_b_proj"},
    "mla": {"kv_a_proj_with_mqa", "kv_b_proj"},
    "stock": {"kv_a_proj_with_mqa", "kv_b_proj"},
}


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("trained", ["kv", "attention", "all"])
def test_train_says_what_trains(kind: str, trained: Trained, converted: Callable[[str], Path]) -> None:
    pupil = _pupil(converted(kind))
    _share(pupil, converted(kind), converted("source"), trained)
    names = set_trained(pupil, trained)
    stored = set(CheckpointReader(converted(kind)).names)
    assert set(names) <= stored
    modules = {name.split(".")[-2] for name in names}
    if trained == "kv":
        assert modules == FACTORS[kind]
    elif trained == "attention":
        assert modules == FACTORS[kind] | {"q_proj", "o_proj"}
    else:
        assert {name.split(".")[-2] for name in stored - set(names)} <= {"kv_a_layernorm"}
    assert len(names) == sum(parameter.requires_grad for parameter in pupil.model.parameters())


def test_an_optimizer_that_was_saved_is_as_new(tmp_path: Path) -> None:
    """torch makes an optimizer's state by a step of zero, which must not count as Adam's first."""

    def steps(*, saved: bool) -> Tensor:
        model = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        if saved:
            RunState(tmp_path).save(model, optimizer, Progress())
            RunState(tmp_path).load(model, optimizer)
        for row in torch.eye(3):
            model(row).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    torch.testing.assert_close(steps(saved=True), steps(saved=False), rtol=0, atol=0)


def test_only_converted_models_are_trained(converted: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="neither a converted model nor an exported one"):
        family_of(CheckpointReader(converted("source")).config)
    model = tiny_model("llama")
    family, _ = family_of(CheckpointReader(converted("joint")).config)
    with pytest.raises(HealingError, match="no latent factors"):
        set_trained(make_pupil(model, family, inner=""), "kv")
