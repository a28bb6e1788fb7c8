"""Healing: a converted model is trained back toward its teacher on accelerate, FSDP2 and torch's distributed checkpoint."""

from care_mla.healing.blocks import Blocks, Order, collect_blocks, held_out, pack, packed_inputs
from care_mla.healing.distillation import Distillation
from care_mla.healing.loop import Run, autocast, is_bfloat16, spread
from care_mla.healing.preconditioning import parameter_groups, plain, precondition
from care_mla.healing.state import full_trained_state, is_main, on_main
from care_mla.healing.student import family_of, folded_in, make_pupil, set_trained, share_teacher, shrink_frozen
from care_mla.healing.teacher import key_of, store, stored

__all__ = [
    "Blocks",
    "Distillation",
    "Order",
    "Run",
    "autocast",
    "collect_blocks",
    "family_of",
    "folded_in",
    "full_trained_state",
    "held_out",
    "is_bfloat16",
    "is_main",
    "key_of",
    "make_pupil",
    "on_main",
    "pack",
    "packed_inputs",
    "parameter_groups",
    "plain",
    "precondition",
    "set_trained",
    "share_teacher",
    "shrink_frozen",
    "spread",
    "store",
    "stored",
]
