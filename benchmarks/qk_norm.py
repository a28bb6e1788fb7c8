"""What linearized QK-norm costs: `--qk-norm exact` and `linear` on SmolLM2 with QK-norm grafted in.

    python benchmarks/qk_norm.py --model build/smollm2-135m --data DATA --work build/qk_norm

The graft is a Qwen3 model of SmolLM2's weights. Its norms divide a head's query or key z by sqrt(mean(z^2) + t m), m the mean square of the
layer's queries or keys on calibration text, and multiply by sqrt((1 + t) m): heads of average size pass as they are. Pure norms
(t near 0) would take from SmolLM2 what its heads' sizes say, and it falls apart; t is SOFTNESS. Calibrated on 24 x 256 tokens of C4, seed 42; nats of 4 windows of 512
tokens of WikiText-2 validation, lost against the graft. What is finished is kept in --work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fidelity import Rows, mean_loss, parser_of, split_texts
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import care_mla
from care_mla.cli import quiet_libraries
from care_mla.evaluation import evaluation_windows
from care_mla.text import load_text, load_tokenizer
from care_mla.text.tokens import tokenize

SOFTNESS = 1.0
"""t: eps of the grafted norms as a share of the mean square that they see."""
EPS = 1e-3
"""rms_norm_eps of the graft, for all its norms; projections and residual stream are scaled to it."""
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters",
)  # fmt: skip


@torch.no_grad()
def mean_squares(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Mean square of every layer's queries and keys, by name of their projection."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):

            def note(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                found[name] = output.square().mean()

            handles.append(module.register_forward_hook(note))
    model(ids)
    for handle in handles:
        handle.remove()
    return found


def graft(source: str, out: Path, ids: Tensor, softness: float = SOFTNESS) -> None:
    """Write SmolLM2 as a Qwen3 model with soft norms."""
    model = care_mla.load(source, dtype="float32")
    config = {key: getattr(model.config, key) for key in SHARED}
    stream = (EPS / model.config.rms_norm_eps) ** 0.5  # RMSNorm(a x; a^2 eps) = RMSNorm(x; eps)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in weights:
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            weights[name] *= stream
    for name, m in mean_squares(model, ids).items():
        weights[f"{name}.weight"] *= (EPS / (softness * m)).sqrt()
        weights[f"{name.replace('_proj', '_norm')}.weight"] = ((1 + softness) * m).sqrt().expand(model.config.head_dim)
    config |= {"head_dim": model.config.head_dim, "rms_norm_eps": EPS, "tie_word_embeddings": False}
    grafted = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **config))
    grafted.load_state_dict(weights)
    grafted.save_pretrained(out)
    load_tokenizer(Path(source)).save_pretrained(out)


FULL: dict[str, Any] = {"cache_elements": 30 * (384 + 64), "ranks": "uniform"}
HALF: dict[str, Any] = {"kv_save": 0.5}
RECIPES: dict[str, dict[str, Any]] = {
    "full rank, exact": {**FULL, "cache_elements": FULL["cache_elements"] + 30 * 3},  # the scales of 3 kv heads
    "full rank, linear": {**FULL, "qk_norm": "linear"},
    "50% saved, exact": HALF,
    "50% saved, linear": {**HALF, "qk_norm": "linear"},
    "50% saved, linear --no-centre": {**HALF, "qk_norm": "linear", "centre": False},
}


def main() -> None:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    quiet_libraries()
    calibration, _ = split_texts(arguments.data, arguments.work / "text")
    tokenizer = load_tokenizer(Path(arguments.model))
    source, stats = arguments.work / "source", arguments.work / "stats"
    if not source.is_dir():
        text = load_text(calibration["c4"])
        graft(arguments.model, source, tokenize(tokenizer, text)[: 16 * 256].view(16, 256))
    windows = evaluation_windows(
        tokenizer, load_text(str(arguments.data / "wikitext2/valid.tokens.txt")), seqlen=512, windows=4
    )
    rows = Rows(arguments.work / "rows.jsonl")
    for name, model in (("original", arguments.model), ("graft", source)):
        if name not in rows.done:
            rows.add(name, {"nats": mean_loss(care_mla.load(model), windows)})
    if not stats.is_dir():
        text = {"calibration": calibration["c4"], "samples": 24, "seqlen": 256, "seed": 42}
        care_mla.calibrate(source, stats, **text, fisher=True, normalized=True)
    for name, recipe in RECIPES.items():
        if name not in rows.done:
            out = arguments.work / "converted"
            options = {"layout": "mla", "qk_rope_head_dim": 64, "rope": "stock", **recipe}
            manifest = care_mla.convert(source, out, stats=stats, overwrite=True, **options)
            errors = [layer.get("norm_error", {"q": 0.0, "k": 0.0}) for layer in manifest["layers"]]
            mean = {part: sum(error[part] for error in errors) / len(errors) for part in ("q", "k")}
            rows.add(name, {"nats": mean_loss(care_mla.load(out), windows), "norm_error": mean})
    print("| conversion of the graft | nats lost | error of normalized queries | of keys |\n|-|-|-|-|")
    for name in RECIPES:
        row = rows.done[name]
        lost, error = row["nats"] - rows.done["graft"]["nats"], row["norm_error"]
        print(f"| {name} | {lost:.3f} | {error['q']:.3f} | {error['k']:.3f} |")


if __name__ == "__main__":
    main()
