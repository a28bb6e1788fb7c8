"""What the layouts make of the features of a source (`FamilySpec.features`), apart from the layouts' mathematics: `care inspect` answers
from a config.json without torch, and takes it from here."""

from __future__ import annotations

WHOLE_ROPE_KEEPS: dict[str, str] = {
    "qkv bias": "k and v biases are added to the rebuilt keys and values",
    "fused qkv": "the rows of q become q_proj",
    "QK-norm": "keys are rebuilt, then normalized",
    "QK-norm over the projection": "keys are rebuilt, then normalized",
    "attention scale": "the attention module's own",
    "soft-cap": "scores are capped by the source's attention function",
    "attention sinks": "same logits in the source's attention function",
    "sliding window": "same masks; windowed layers cache a window of latents",
    "RoPE scaling": "keys are rotated by the model's own rotary module",
    "length-dependent RoPE": "cosines and sines are cached too: keys stay turned as they were when they came in",
    "partial RoPE": "keys are rebuilt whole, then rotated in part",
    "interleaved RoPE": "keys are rotated by the family's own function",
    "RoPE by layer type": "keys are rotated by their layer's frequencies",
    "layers without RoPE": "keys are not rotated there",
    "tied embeddings": "unchanged",
}
"""Layouts joint and split: feature -> how it is kept."""

MLA_KEEPS: dict[str, str] = {
    "qkv bias": "the rotary key keeps its bias, softmax is blind to that of the position-free keys, the values' joins o_proj",
    "fused qkv": "q, k and v are read from their rows",
    "attention scale": "the attention module's own",
    "sliding window": "same masks; windowed layers cache a window",
    "RoPE scaling": "the rotary key is turned by the model's own rotary module",
    "tied embeddings": "unchanged",
    "QK-norm": "one scale a kv head is cached and multiplies scores; or linearized, approximately (`--qk-norm linear`)",
}
"""Layout mla: feature -> how it is kept."""

MLA_REFUSES: dict[str, str] = {
    "QK-norm over the projection": "the cached scales are those of heads; a norm over all of them is not built",
    "soft-cap": "constants of the position-free keys are left to softmax, which is not blind to them once scores are capped",
    "attention sinks": "constants of the values move into o_proj's bias, and beside a sink the attention weights do not sum to one",
    "length-dependent RoPE": "it changes the frequencies with the length, so no rotary pair can be chosen",
    "partial RoPE": "rotary pairs are chosen among those of the whole head",
    "interleaved RoPE": "rotary pairs are read across the halves of a head",
    "RoPE by layer type": "rotary pairs are chosen by one set of frequencies",
    "layers without RoPE": "their shared key would be turned",
}
"""Features that layout mla cannot keep -> why."""
