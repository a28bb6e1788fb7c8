"""The model that is trained, and its teacher.

Only attentions differ between a converted model and its source, so both live in one model: every attention is a pair, and a
switch says which of the two runs. The teacher costs its attention weights, not a second model. Where other weights differ or
are trained, the teacher is a model of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from care_mla.checkpoint import CheckpointReader
from care_mla.errors import CheckpointError, HealingError
from care_mla.export.deepseek import NORM_GAIN, NORM_WEIGHT, SHRUNK
from care_mla.families import FamilySpec, get_family
from care_mla.modeling import LANGUAGE_MODEL, skeleton
from care_mla.names import Trained

Runs = Literal["student", "teacher"]

STUDENT = "student"
"""Name of a pair's converted attention; it is not part of the weights' names on disk."""

KV_FACTORS = ("kv_a_proj", "k_b_proj", "v_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""Modules of a converted attention that make its keys and values: what `train = kv` trains."""
DOWN_FACTORS = ("kv_a_proj", "kv_a_proj_with_mqa")
"""Those that make latents."""
NEVER_TRAINED = ("q_a_layernorm", "q_a_proj")
"""Of an exported checkpoint: they hand x through to q_b_proj, exactly."""


class Switch:
    """Which attention of every pair runs; shared by all pairs of a model."""

    def __init__(self) -> None:
        self.runs: Runs = "student"


class PairedAttention(nn.Module):
    """A converted attention and the source's, in one place of a decoder layer."""

    def __init__(self, student: nn.Module, teacher: nn.Module, switch: Switch):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.switch = switch

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        runs = self.student if self.switch.runs == "student" else self.teacher
        return runs(hidden_states, *args, **kwargs)


@dataclass
class Pupil:
    """A model made ready for training.

    Attributes:
        model: holds student and, where weights are shared, the teacher's attentions.
        switch: see `Switch`; None where the teacher is a model of its own.
        family: of the transformers model inside (the source's, or that of an export).
        inner: path of that model in `model`, "" or `LANGUAGE_MODEL`.
        folded: attentions whose identity norms were taken out, see `fold_identity_norms`.
    """

    model: PreTrainedModel
    family: FamilySpec
    inner: str
    switch: Switch | None = None
    folded: bool = False

    def attentions(self) -> Iterator[Any]:
        """Of every layer, as it stands in the model now (a pair, or the converted one)."""
        for layer in self.decoder_layers():
            yield getattr(layer, self.family.attention)

    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers."""
        model = self.model.get_submodule(self.inner) if self.inner else self.model
        layers = model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def stored_name(self, name: str) -> str:
        """Name of a parameter on disk."""
        return name.replace(f"{self.family.attention}.{STUDENT}.", f"{self.family.attention}.")


def make_pupil(model: PreTrainedModel, family: FamilySpec, *, inner: str) -> Pupil:
    """Wrap a loaded model; nothing is trainable yet, dropout is off and attentions take their training path."""
    pupil = Pupil(model.eval(), family, inner)
    model.requires_grad_(False)
    for attention in pupil.attentions():
        attention.training = True  # the expanded path of converted attentions, whose gradients attention kernels know
        if hasattr(attention, "attention_dropout"):
            attention.attention_dropout = 0.0
    pupil.folded = fold_identity_norms(pupil)
    return pupil


def share_teacher(pupil: Pupil, own: CheckpointReader, source: CheckpointReader, trained: Trained) -> bool:
    """Pair every attention with the source's, if everything else is the source's own and stays so.

    Args:
        own: checkpoint that the pupil was loaded from.

    Returns:
        Whether that was possible; if not, the teacher must be loaded as a model of its own.

    Raises:
        CheckpointError: the source lacks weights of an attention.
    """
    if trained == "all" or not pupil.inner or not _same_beside_attention(pupil, own, source):
        return False
    originals = skeleton({key: value for key, value in source.config.items() if key != "quantization_config"})
    # Not the wrapper's: sinks and soft-caps have attention functions of their own.
    originals.config._attn_implementation = pupil.model.config.get_text_config()._attn_implementation
    switch = Switch()
    layers = originals.get_submodule(pupil.family.layers)
    assert isinstance(layers, nn.ModuleList)
    for index, (layer, original) in enumerate(zip(pupil.decoder_layers(), layers, strict=True)):
        student, teacher = getattr(layer, pupil.family.attention), getattr(original, pupil.family.attention)
        like = next(student.parameters())
        prefix = f"{pupil.family.attention_name(index)}."
        weights = {name: source[prefix + name].to(like.device, like.dtype) for name in teacher.state_dict()}
        teacher.load_state_dict(weights, assign=True)
        teacher.requires_grad_(False).eval()
        setattr(layer, pupil.family.attention, PairedAttention(student, teacher, switch))
    pupil.switch = switch
    return True


def _same_beside_attention(pupil: Pupil, own: CheckpointReader, source: CheckpointReader) -> bool:
    """Whether all weights outside the attentions are the source's; compared as stored, since models fuse experts in memory."""
    inside = tuple(f"{pupil.family.attention_name(layer)}." for layer in range(len(pupil.decoder_layers())))
    prefix = f"{pupil.inner}."
    beside = {name for name in own.names if not name.removeprefix(prefix).startswith(inside)}
    originals = {f"{prefix}{name}" for name in source.names if not name.startswith(inside)}
    if beside != originals:
        return False
    return all(torch.equal(own[name].float(), source[name.removeprefix(prefix)].float()) for name in beside)


def shrink_frozen(pupil: Pupil, dtype: torch.dtype) -> None:
    """Keep the weights of frozen linear layers in the precision of the products: half the memory, and no cast in every pass.

    A head that shares its weight with the embedding gets one of its own; norms, embedding and what trains stay as they are.
    """
    embedding = pupil.model.get_input_embeddings().weight
    for module in pupil.model.modules():
        if not isinstance(module, nn.Linear) or module.weight.requires_grad:
            continue
        if module.weight is embedding:
            module.weight = nn.Parameter(embedding.detach().to(dtype), requires_grad=False)
        else:
            module.weight.data = module.weight.data.to(dtype)


def set_trained(pupil: Pupil, trained: Trained) -> list[str]:
    """Make parameters trainable, in float32; the names of those, as on disk.

    Raises:
        HealingError: nothing of that kind is in the model.
    """
    names = []
    teacher = tuple(f"{name}." for name, module in pupil.model.named_modules() if isinstance(module, PairedAttention))
    for name, parameter in pupil.model.named_parameters():
        if any(name.startswith(f"{pair}teacher.") for pair in teacher):
            continue
        parts = name.split(".")
        in_attention = pupil.family.attention in parts
        wanted = trained == "all" or (in_attention and (trained == "attention" or bool(set(parts) & set(KV_FACTORS))))
        if wanted and parameter.is_floating_point() and not (set(parts) & set(NEVER_TRAINED) and not pupil.inner):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
            names.append(pupil.stored_name(name))
    if not names:
        raise HealingError(
            f"this model has no latent factors ({', '.join(KV_FACTORS)}), so --train {trained} trains nothing; heal a directory that `care convert` or `care export` wrote"
        )
    return names


# --- identity norms of exported checkpoints ---------------------------------------------------------------------------


def fold_identity_norms(pupil: Pupil) -> bool:
    """Take kv_a_layernorm out of attentions where it is the identity by its scales (`export.deepseek`); whether there were any.

    Trained as they are, the shrunk rows would move the norm away from the identity and be stepped over by any optimizer.
    """
    found = False
    for attention in pupil.attentions():
        norm = getattr(attention, "kv_a_layernorm", None)
        if norm is None or not bool((norm.weight == NORM_WEIGHT).all()):
            continue
        _scale_latents(attention, 1.0 / SHRUNK, NORM_GAIN)
        attention.kv_a_layernorm = nn.Identity()
        found = True
    return found


def _scale_latents(attention: Any, down: float, up: float) -> None:
    down_proj, up_proj = attention.kv_a_proj_with_mqa, attention.kv_b_proj
    rank = up_proj.weight.shape[1]
    with torch.no_grad():
        down_proj.weight[:rank] = (down_proj.weight[:rank].double() * down).to(down_proj.weight.dtype)
        up_proj.weight.copy_((up_proj.weight.double() * up).to(up_proj.weight.dtype))


def beside_identity_norm(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A trained tensor of a folded attention as it stands beside the identity norm, float64.

    Args:
        name: on disk.
        rank: kv_lora_rank.
    """
    tensor = tensor.double()
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return torch.cat([tensor[:rank] * SHRUNK, tensor[rank:]])
    return tensor / NORM_GAIN if name.endswith("kv_b_proj.weight") else tensor


def family_of(config: dict[str, Any]) -> tuple[FamilySpec, str]:
    """Family and inner path of a converted or exported model by its config.json.

    Raises:
        CheckpointError: neither.
    """
    if config.get("layout") is not None and isinstance(config.get("text_config"), dict):
        return get_family(config["text_config"]), LANGUAGE_MODEL
    if "kv_lora_rank" in config:
        return STOCK, ""
    raise CheckpointError("this is neither a converted model nor an exported one: its config.json has no kv_lora_rank")


STOCK = FamilySpec(model_type="deepseek_v3")
"""Where the parts of an exported checkpoint are; not a family that can be converted."""
