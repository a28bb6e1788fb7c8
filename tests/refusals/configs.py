"""config.json that cannot be read, and models that are none to convert."""

from __future__ import annotations

import json
from typing import Any

from refusals import CALIBRATE, CONVERT, Place, Refusal

KIND, OTHERS, PATHS = "config.json", "Models", "SOURCE"
LOST = object()


def _config(**changes: Any) -> Any:
    def prepare(place: Place) -> None:
        path = place.source / "config.json"
        whole = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in whole.items() if value is not LOST}))

    return prepare


def _case(
    given: str, says: str, command: tuple[str, ...] = ("inspect", "SOURCE"), kind: str = KIND, **changes: Any
) -> Refusal:
    return Refusal(kind, given, command, says, _config(**changes))


def _written(text: str) -> Any:
    return lambda place: (place.source / "config.json").write_text(text)


EVAL = ("eval", "SOURCE", "--text", "TEXT", "--seqlen", "16", "--windows", "1")


def _converted(**changes: Any) -> Any:
    """config.json of a converted model, whose source has 3 layers."""

    def prepare(place: Place) -> None:
        path = place.source / "config.json"
        path.write_text(json.dumps({"model_type": "care_mla", "text_config": json.loads(path.read_text()), **changes}))

    return prepare


CASES = [
    Refusal(KIND, "no JSON", ("inspect", "SOURCE"), "is not valid JSON", _written("{")),
    Refusal(KIND, "a list", ("inspect", "SOURCE"), "does not hold a JSON object", _written("[]")),
    Refusal(KIND, "nested too deeply", ("inspect", "SOURCE"), "is not valid JSON", _written("[" * 100000)),
    _case("no model_type", "has no model_type", model_type=LOST),
    _case("model_type that is a list", "model_type = []", model_type=[]),
    _case("architectures that is a word", "a list of class names", architectures="LlamaForCausalLM"),
    _case("no num_hidden_layers", "has no num_hidden_layers", num_hidden_layers=LOST),
    _case("null layers", "num_hidden_layers = null", ("plan", "SOURCE"), num_hidden_layers=None),
    _case("a billion layers", "at most 1000", num_hidden_layers=10**9),
    _case("heads in words", 'num_attention_heads = "four"', CONVERT, num_attention_heads="four"),
    _case("heads with a decimal point", "num_attention_heads = 4.0", num_attention_heads=4.0),
    _case("no kv heads", "num_key_value_heads = 0", num_key_value_heads=0),
    _case("kv heads that do not divide", "cannot be grouped", num_key_value_heads=3),
    _case("odd head_dim", "RoPE turns dimensions in pairs", head_dim=15),
    _case("a width that heads do not divide", "hidden_size = 49", hidden_size=49),
    _case("null vocabulary", "vocab_size = null", CALIBRATE, vocab_size=None),
    _case("an activation that does not exist", 'hidden_act = "relu7"', hidden_act="relu7"),
    _case("padding outside the vocabulary", "pad_token_id = 5000", pad_token_id=5000),
    _case("dtype foo", 'dtype = "foo"', dtype="foo"),
    _case("a norm of NaN", "rms_norm_eps = NaN", rms_norm_eps=float("nan")),
    _case("too few layer_types", "layer_types has 1 entries for num_hidden_layers = 3", layer_types=["full_attention"]),
    _case("unknown layer_types", 'layer_types = "sparse"', layer_types=["sparse"] * 3),
    _case("RoPE in a word", 'rope_scaling = "yarn"', rope_parameters=LOST, rope_scaling="yarn"),
    _case("RoPE of no kind", "rope_parameters.rope_type", rope_parameters={"rope_type": "magic", "rope_theta": 1e4}),
    _case("a null factor", "rope_parameters.factor = null", rope_parameters={"rope_type": "linear", "factor": None}),
    _case("no factor", "Missing required keys", rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
    _case("a model that transformers cannot build", 'use_cache = "x"', EVAL, use_cache="x"),
    Refusal(KIND, "a converted model without its source's config", EVAL, "text_config = 3", _converted(text_config=3)),
    Refusal(KIND, "a converted model of no layout", EVAL, 'layout = "x"', _converted(layout="x")),
    Refusal(KIND, "a converted model with too few ranks", EVAL, "kv_lora_rank = [4]", _converted(kv_lora_rank=[4])),
    Refusal(
        KIND,
        "healing of a converted model with too few ranks",
        ("heal", "SOURCE", "--out", "OUT", "--teacher", "SOURCE", "--device", "cpu"),
        "kv_lora_rank = [4]",
        _converted(layout="joint", kv_lora_rank=[4]),
    ),
    Refusal(
        KIND,
        "export of a model of layout mla without frequencies",
        ("export", "SOURCE", "--out", "OUT"),
        "rope_frequencies = null",
        _converted(layout="mla", kv_lora_rank=[4, 4, 4], o_bias=False),
    ),
    _case(
        "a wrapper of a text model",
        "wraps a text model",
        kind=OTHERS,
        model_type="gemma3",
        text_config={"model_type": "gemma3_text"},
    ),
    _case(
        "a model that has MLA", "already (kv_lora_rank = 512)", kind=OTHERS, model_type="deepseek_v3", kv_lora_rank=512
    ),
    _case("a state-space model", "has no attention", kind=OTHERS, model_type="mamba"),
    _case("a hybrid", "layers without attention", kind=OTHERS, model_type="qwen3_next"),
    _case("an encoder", "is an encoder", kind=OTHERS, model_type="bert"),
    _case("a model that translates", "an encoder and a decoder", kind=OTHERS, model_type="t5"),
    _case("another architecture", "no family spec", kind=OTHERS, model_type="gpt_neox"),
    Refusal(PATHS, "nothing", ("inspect", ""), "SOURCE is empty"),
    Refusal(PATHS, "a name of 300 letters", ("inspect", "x" * 300), "name too long"),
    Refusal(PATHS, "a path below a file", ("inspect", "TEXT/model"), "not a directory"),
    Refusal(PATHS, "the home of nobody", ("inspect", "~nobody-of-this-name"), "no such user"),
    Refusal(
        PATHS,
        "a loop of links",
        ("inspect", "WORK/loop"),
        "too many levels of symbolic links",
        lambda place: (place.directory / "loop").symlink_to(place.directory / "loop"),
    ),
    Refusal(PATHS, "a revision of a directory", ("inspect", "SOURCE", "--revision", "v1"), "is a local path"),
    Refusal(PATHS, "two revisions", ("inspect", "org/name@v1", "--revision", "v2"), "names a revision already"),
    Refusal(
        PATHS,
        "a file that only ends in .gguf",
        ("fetch", "WORK/x.gguf", "OUT"),
        "not a GGUF file",
        lambda place: (place.directory / "x.gguf").write_bytes(b"GG"),
    ),
]
