"""Training text: what a SPEC names, as packed blocks; made once a run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla.checkpoint import resolve_source
from care_mla.config import HealSettings
from care_mla.errors import CalibrationError, ConfigError
from care_mla.files import write_tensors
from care_mla.healing.blocks import Blocks, pack
from care_mla.healing.pair import Pair
from care_mla.healing.processes import on_main
from care_mla.modeling import load
from care_mla.progress import Track, silent
from care_mla.text import stream_documents
from care_mla.text.documents import Document
from care_mla.text.hub import HUB_CORPORA
from care_mla.text.sampling import copying_windows, sample_from_model
from care_mla.text.specs import COPY, SELF, parse_spec, require_distinct, share
from care_mla.text.tokens import embedding_rows, first_tokens, leading_bos, load_tokenizer, require_embedded


def require_text(data: str, source: str | Path) -> None:
    """The first document of every local corpus of a SPEC can be read; what is on the hub is not asked for.

    Raises:
        ConfigError, CalibrationError, CheckpointError
    """
    parts = parse_spec(data)
    require_distinct(parts, data)
    tokenizer = load_tokenizer(resolve_source(source))
    for part in parts:
        if part.name not in (SELF, COPY, *HUB_CORPORA):
            next(stream_documents(part.name, tokenizer=tokenizer))


def run_blocks(pair: Pair, settings: HealSettings, path: Path, device: torch.device, track: Track) -> Blocks:
    """All blocks of a run, held-out ones included; collected once, by the main process.

    Args:
        path: where they are kept, or are from an earlier start of the run.
        device: where the teacher samples, for `self`.
    """

    def collect() -> None:
        if path.is_file():
            return
        from_model = any(part.name == SELF for part in parse_spec(settings.data))
        blocks = collect_blocks(
            settings.data,
            load_tokenizer(pair.directory),
            count=settings.num_steps * settings.batch_size + settings.eval_blocks,
            seqlen=settings.seqlen,
            seed=settings.seed,
            field=settings.field,
            model=load(pair.teacher.directory, device=device) if from_model else None,
            vocabulary=embedding_rows(pair.directory),
            track=track,
        )
        write_tensors(path, blocks.to_tensors())

    on_main(collect)
    return Blocks(**load_file(path))


def collect_blocks(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    seqlen: int,
    seed: int,
    field: str | None = None,
    model: PreTrainedModel | None = None,
    vocabulary: int | None = None,
    track: Track = silent,
) -> Blocks:
    """At most `count` blocks of a SPEC (as of `care calibrate`), shared out by weight. No more text is read than they need.

    Args:
        model: needed for `self`.
        vocabulary: tokens that the model embeds; None: not checked.

    Raises:
        ConfigError, CalibrationError: bad spec, missing text, less than one block of it, or tokens that the model does not know.
    """
    parts = parse_spec(spec)
    if count < len(parts):
        raise ConfigError(
            f"{count} blocks of {seqlen} tokens are less than one for each of the {len(parts)} corpora of {spec!r}; give more --tokens"
        )
    require_distinct(parts, spec)
    bos = leading_bos(tokenizer)
    collected = []
    for index, (part, wanted) in enumerate(zip(parts, share(count, [p.weight for p in parts]), strict=True)):
        if part.name in (SELF, COPY):
            if part.name == SELF:
                if model is None:
                    raise ConfigError("data `self` needs the model itself")
                rows = sample_from_model(model, tokenizer, wanted, seqlen, seed + index, track=track)
            else:
                rows = copying_windows(tokenizer, wanted, seqlen, seed + index, bos, vocabulary)
            blocks = Blocks(
                rows.to(torch.int32), torch.arange(seqlen, dtype=torch.int32).expand(wanted, -1).contiguous()
            )
        else:
            documents = stream_documents(part.name, field=field, tokenizer=tokenizer)
            blocks = pack((_document(tokenizer, d, bos, wanted * seqlen) for d in documents), seqlen, wanted)
            if not len(blocks):
                raise CalibrationError(
                    f"{part.name} holds less than one block of {seqlen} tokens; give more text or a smaller --seqlen"
                )
        require_embedded(blocks.input_ids, tokenizer, vocabulary, part.name)
        collected.append(blocks)
    return Blocks(torch.cat([b.input_ids for b in collected]), torch.cat([b.positions for b in collected]))


def _document(tokenizer: PreTrainedTokenizerBase, document: Document, bos: int | None, most: int) -> Tensor:
    """[BOS] text [EOS], where the tokenizer writes the first and has the second; the first `most` tokens of a longer one."""
    ids, whole = first_tokens(tokenizer, document, most)
    written = bos is None or ids[:1].tolist() == [bos]  # by a chat template
    first = [] if written else [bos]
    last = [tokenizer.eos_token_id] if whole and tokenizer.eos_token_id is not None else []
    return torch.cat([torch.tensor(first, dtype=torch.long), ids, torch.tensor(last, dtype=torch.long)])
