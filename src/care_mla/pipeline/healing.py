"""Healing: a converted model and its teacher become a trained checkpoint, a record and a report."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from care_mla.checkpoint import (
    CheckpointReader,
    Kind,
    ShardedWriter,
    claim,
    copy_side_files,
    require_output,
    resolve_source,
)
from care_mla.checkpoint.outputs import Claim, mark, remove, require_apart, require_replaceable
from care_mla.checkpoint.reader import read_json
from care_mla.config import HealSettings
from care_mla.errors import CheckpointError, ConfigError, ConversionError, HealingError
from care_mla.files import copy_file, write_json, write_tensors, writing
from care_mla.pipeline.conversion import convert
from care_mla.pipeline.evaluation import draw_report, saved_evaluations
from care_mla.pipeline.inputs import inputs_of
from care_mla.pipeline.source import open_source
from care_mla.progress import Meter, Track, silent, silent_meter
from care_mla.records.artifacts import EXPORT, HEALING, MANIFEST, METRICS, SPECTRA, versions
from care_mla.runtime import is_out_of_memory, resolve_device

if TYPE_CHECKING:
    from care_mla.healing import Blocks, Distillation, Run
    from care_mla.healing.student import Pupil

BLOCKS_FILE = "blocks.safetensors"
SETTINGS_FILE = "settings.json"
SCALES_FILE = "scales.safetensors"
REQUEST_FILE = "request.json"
"""What `convert_and_heal` was asked for."""
ONE_SHOT = "one-shot"
"""Below the directory of a run's state: the conversion that `convert_and_heal` heals."""
WORK_FILES = (
    SETTINGS_FILE,
    BLOCKS_FILE,
    SCALES_FILE,
    REQUEST_FILE,
    METRICS,
    "step-*",
    "best*",
    "bad-batch-*",
    "teacher-*",
    f"{ONE_SHOT}/*",
    f".{ONE_SHOT}.*",
    ".*.lock",
)
"""What may be in the directory of a run's state; with anything else it is not removed."""
SCALE_BLOCKS = 8
"""Blocks of the training text on which inputs and outputs of the factors are measured (`healing.preconditioning`)."""

_log = logging.getLogger("care_mla")

MeterFactory = Callable[[int, str], AbstractContextManager[Meter]]
"""(total, unit) -> a meter for as long as the context lasts."""


@dataclass(frozen=True)
class _Opened:
    """A converted or exported model, and its teacher; weights not yet read.

    Attributes:
        name: of the model, as the record says it.
        record: its manifest, or what `care export` wrote; empty without either.
    """

    name: str
    directory: Path
    reader: CheckpointReader
    record: dict[str, Any]
    teacher_name: str
    teacher: CheckpointReader


def heal(
    model: str | Path,
    out: str | Path,
    *,
    teacher: str | Path | None = None,
    teacher_logits: str | Path | None = None,
    log_with: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | int | torch.device | None = None,
    name: str | None = None,
    track: Track = silent,
    meter: MeterFactory | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a converted or exported model toward its teacher.

    Started by `torchrun` or `accelerate launch`, all processes train together; what is written does not depend on their number.

    Args:
        model: directory that `convert` or `export` wrote.
        out: directory of the healed model; appears whole or not at all. Until then, `OUT.healing` holds what --resume needs.
        teacher: model directory or hub id; None: the source that the model was converted from.
        teacher_logits: directory in which `teacher_top_k` probabilities stay for other runs on the same text; None: `OUT.healing`.
        log_with: a tracker that accelerate knows ("tensorboard", "trackio", ...), beside `METRICS`.
        resume: go on from the state in `OUT.healing`, with the settings that the run was started with.
        device: see `runtime.resolve_device`; several processes have an accelerator each.
        name: how the record calls the model; None: its path.
        settings: fields of `HealSettings`.

    Returns:
        The record of the run, as saved in `out`.

    Raises:
        ConversionError: nothing is left at `out` then; the state for --resume stays.
    """
    with ExitStack() as held:
        return _heal(
            model,
            Path(out),
            held,
            teacher=teacher,
            teacher_logits=teacher_logits,
            log_with=log_with,
            resume=resume,
            overwrite=overwrite,
            device=device,
            name=name,
            track=track,
            meter=meter,
            settings=settings,
        )


def _heal(
    model: str | Path,
    out: Path,
    held: ExitStack,
    *,
    claimed: Claim | None = None,
    teacher: str | Path | None = None,
    teacher_logits: str | Path | None = None,
    log_with: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | int | torch.device | None = None,
    name: str | None = None,
    track: Track = silent,
    meter: MeterFactory | None = None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """`heal`, its output held on the main process for as long as `held` is open.

    Args:
        claimed: of a caller that holds the output already.
    """
    work = healing_directory(out)
    inputs = inputs_of(source=model, teacher=teacher, text=settings.get("data"))
    if claimed is None:
        require_output(out, Kind.HEALED, inputs, overwrite=overwrite)
        require_apart(work, inputs, option="the run's state")
    started = _started(work) if resume else {"settings": {}, "teacher_name": None}
    chosen: HealSettings = HealSettings.make(**{**started["settings"], **settings})
    _require_settings(chosen)
    accelerator = _accelerator(device, log_with, out)
    from care_mla.healing import full_trained_state, on_main, plain

    opened = _open(model, teacher or started["teacher_name"], name)
    inputs += inputs_of(source=opened.directory, teacher=opened.teacher.directory)
    if chosen.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"--batch-size {chosen.batch_size} is not a multiple of the {accelerator.num_processes} processes"
        )
    if not accelerator.is_main_process:
        track, meter = silent, None
    mine = [claimed] if claimed is not None else []
    if claimed is None:
        on_main(
            lambda: mine.append(held.enter_context(claim(out, Kind.HEALED, inputs, overwrite=overwrite, shared=True)))
        )
    on_main(lambda: _prepare_work(work, chosen, opened, started if resume else None, overwrite=overwrite))
    with _memory_named(chosen):
        try:
            run, distillation, names = _make_run(opened, chosen, accelerator, work, teacher_logits, track)
        except ConversionError:
            if not resume and claimed is None:  # nothing to go on from
                on_main(lambda: remove(work))
            raise
        if resume:
            run.resume()
        if log_with is not None:
            accelerator.init_trackers("care-heal", config=chosen.model_dump(mode="json", exclude={"betas"}))
        if meter is None:
            progress = run.train_all(silent_meter)
        else:
            with meter(run.steps * chosen.batch_size * chosen.seqlen, "tokens") as show:
                progress = run.train_all(show)
    state = plain(distillation, full_trained_state(run.module))
    best = next(e for e in progress.evaluations if e["step"] == progress.best_step)
    record = {
        "format": "care-mla healing 1",
        "settings": chosen.model_dump(mode="json"),
        "lr": run.lr,
        "model": {"name": opened.name, "fingerprint": opened.reader.fingerprint},
        "teacher": {
            "name": opened.teacher_name,
            "fingerprint": opened.teacher.fingerprint,
            "shares_weights": distillation.teacher is None,
        },
        "evaluations_before": saved_evaluations(opened.directory),
        "text": {"tokens": run.train.num_tokens, "held_out_tokens": run.held_out.num_tokens},
        "trained": {"tensors": len(names), "parameters": sum(t.numel() for t in state.values())},
        "processes": accelerator.num_processes,
        **{key: value for key, value in asdict(progress).items() if key not in ("rng", "stale")},
        "stopped_early": progress.step < run.steps,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "one_shot": progress.evaluations[0],
        "healed": best,
        "versions": versions(),
    }
    on_main(lambda: _write(opened, mine[0], work, distillation.pupil, state, record))
    on_main(lambda: remove(work))
    accelerator.wait_for_everyone()  # a process that leaves early takes the connections of the others with it
    accelerator.end_training()  # and with it the process group
    return record


@contextmanager
def _memory_named(settings: HealSettings) -> Iterator[None]:
    """
    Raises:
        HealingError: memory is short; what to lower.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise HealingError(
            f"out of memory: lower --micro-batch-size (now {settings.micro_batch_size or settings.batch_size} blocks) or --seqlen, or give "
            "--gradient-checkpointing or, over several devices, --shard; --resume goes on from the last saved state"
        ) from error


def healing_directory(out: str | Path) -> Path:
    """Where the state of an unfinished run is kept."""
    out = Path(out)
    return out.with_name(f"{out.name}.healing")


def kept_after_interrupt(out: str | Path) -> str:
    """How to go on after an interrupted run toward `out`; empty where nothing is kept."""
    work = healing_directory(out)
    if not work.is_dir():
        return ""
    if (work / REQUEST_FILE).is_file():
        what = "the run" if (work / SETTINGS_FILE).is_file() else "the conversion"
        return f"{work} holds {what} so far, and the same command goes on with it"
    return f"{work} holds the run so far, and --resume goes on with it"


def convert_and_heal(
    source: str | Path,
    out: str | Path,
    *,
    heal_tokens: int,
    heal_data: str | None = None,
    overwrite: bool = False,
    device: str | int | torch.device | None = None,
    track: Track = silent,
    meter: MeterFactory | None = None,
    **conversion: Any,
) -> dict[str, Any]:
    """Convert a checkpoint and heal it as the last stage.

    Args:
        source, out, conversion: as of `convert`.
        heal_tokens: as `tokens` of `heal`; all else of the training is its defaults.
        heal_data: None: what the conversion was calibrated on.

    Returns:
        The manifest, the healing in it.

    Raises:
        ConversionError: nothing is left at `out` then. What is done so far is in `OUT.healing`, and the same call goes on with it.
    """
    out = Path(out)
    work = healing_directory(out)
    text = (conversion.get("calibration") or {}).get("calibration")
    inputs = inputs_of(source=source, stats=conversion.get("stats"), text=heal_data or text)
    require_output(out, Kind.HEALED, inputs, overwrite=overwrite)
    require_apart(work, inputs, option="the run's state")
    # What the last stage would refuse is refused before the first.
    HealSettings.make(tokens=heal_tokens)
    where = resolve_device(device)
    _require_accelerate()
    if heal_data is not None:
        _require_text(heal_data, source)
    request = {
        "source": open_source(source).reader.fingerprint,
        "heal_tokens": heal_tokens,
        "heal_data": heal_data,
        "conversion": {key: str(value) if isinstance(value, Path) else value for key, value in conversion.items()},
    }
    with ExitStack() as held:
        claimed = held.enter_context(claim(out, Kind.HEALED, inputs, overwrite=overwrite))
        one_shot = _one_shot(work, request, overwrite=overwrite)
        try:
            if not (one_shot / MANIFEST).is_file():
                convert(source, one_shot, device=where, track=track, **conversion)
        except ConversionError:
            remove(work)
            raise
        manifest = read_json(one_shot / MANIFEST)
        calibration = manifest["calibration"]["settings"]
        record = _heal(
            one_shot,
            out,
            held,
            claimed=claimed,
            resume=(work / SETTINGS_FILE).is_file(),
            device=where,
            name=f"{source}, converted",
            track=track,
            meter=meter,
            settings={
                "data": heal_data or calibration["calibration"],
                "field": calibration["field"] if heal_data is None else None,
                "tokens": heal_tokens,
            },
        )
    return {**manifest, "healing": [record]}


def _one_shot(work: Path, request: dict[str, Any], *, overwrite: bool) -> Path:
    """Where the conversion of a request is, or goes; what an earlier call with the same request has done is kept.

    Raises:
        HealingError: another run is there.
    """
    if work.exists():
        require_replaceable(work, Kind.HEALING, overwrite=True, option="the run's state")
        path = work / REQUEST_FILE
        same = path.is_file() and read_json(path) == json.loads(json.dumps(request))
        if same and not (overwrite and _is_outdated(work)):
            _log.warning("going on with what an earlier call left in %s", work)
            return work / ONE_SHOT
    _require_no_run(work, overwrite)
    _make_work(work)
    write_json(work / REQUEST_FILE, request)
    return work / ONE_SHOT


def _make_work(work: Path) -> None:
    """A new directory for the state of a run, in place of what was there."""
    if work.exists():
        require_replaceable(work, Kind.HEALING, overwrite=True, option="the run's state")
        remove(work)
    with writing(work):
        work.mkdir(parents=True)
    mark(work, Kind.HEALING, WORK_FILES)


def _require_accelerate() -> None:
    """
    Raises:
        ConfigError: not installed.
    """
    if find_spec("accelerate") is None:
        raise ConfigError("healing needs accelerate: pip install 'care-mla[heal]'")


def _require_no_run(work: Path, overwrite: bool) -> None:
    """
    Raises:
        HealingError: an unfinished run is there.
    """
    if work.exists() and any(work.iterdir()) and not overwrite:
        raise HealingError(f"{work} holds an unfinished run; go on with --resume, or start anew with --overwrite")


def _require_text(data: str, source: str | Path) -> None:
    """The first document of every local corpus of a SPEC can be read; what is on the hub is not asked for.

    Raises:
        ConfigError, CalibrationError, CheckpointError
    """
    from care_mla.text import load_tokenizer, stream_documents
    from care_mla.text.hub import HUB_CORPORA
    from care_mla.text.specs import COPY, SELF, parse_spec, require_distinct

    parts = parse_spec(data)
    require_distinct(parts, data)
    tokenizer = load_tokenizer(resolve_source(source))
    for part in parts:
        if part.name not in (SELF, COPY, *HUB_CORPORA):
            next(stream_documents(part.name, tokenizer=tokenizer))


def _accelerator(device: str | int | torch.device | None, log_with: str | None, out: Path) -> Any:
    """
    Raises:
        ConfigError: accelerate or the tracker is not installed, or a device that is not there, or of one process alone.
    """
    _require_accelerate()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    where = resolve_device(device)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone and where.index is not None:
        raise ConfigError(f"--device {device}: each process has a device of its own; name --device {where.type}")
    if alone and PartialState._shared_state.get("device", where) != where:
        # accelerate keeps the device of its first run for as long as the process lives
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with _accelerate_on(where if alone else None):
            accelerator = Accelerator(
                cpu=where.type == "cpu",
                log_with=log_with,
                project_dir=out.with_name(f"{out.name}.logs"),
            )
    except ValueError as error:
        raise ConfigError(f"--log-with {log_with}: {error}") from error
    if log_with is not None and not accelerator.log_with:
        raise ConfigError(f"--log-with {log_with} is not installed: pip install {log_with}")
    return accelerator


@contextmanager
def _accelerate_on(device: torch.device | None) -> Iterator[None]:
    """What accelerate reads to know its device; None: it finds out by itself, as each of several processes must."""
    name, before = "ACCELERATE_TORCH_DEVICE", os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device is not None:
        os.environ[name] = str(device)
    try:
        yield
    finally:
        if device is not None:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})


def _require_settings(settings: HealSettings) -> None:
    """Combinations that cannot be carried out.

    Raises:
        ConfigError
    """
    if not settings.kl_weight and not settings.ce_weight:
        raise ConfigError("--kl-weight and --ce-weight are both 0: nothing would be learned")


def _open(model: str | Path, teacher: str | Path | None, name: str | None) -> _Opened:
    """Find model, teacher and their records, and check that they belong together.

    Raises:
        ConversionError
    """
    from care_mla.healing import family_of
    from care_mla.modeling import require_loadable
    from care_mla.text import load_tokenizer

    directory = resolve_source(model)
    reader = CheckpointReader(directory)
    family_of(reader.config)
    require_loadable(directory)
    record = next((read_json(directory / f) for f in (MANIFEST, EXPORT) if (directory / f).is_file()), {})
    teacher_name = str(teacher) if teacher is not None else _teacher_of(record, directory)
    try:
        teacher_directory = resolve_source(teacher_name)
    except CheckpointError as error:
        if teacher is not None:
            raise
        raise CheckpointError(
            f"{teacher_name}, from which {directory} was converted, is not found from here; name it with --teacher"
        ) from error
    teacher_reader = CheckpointReader(teacher_directory)
    require_loadable(teacher_directory)
    vocabularies = [(r.config.get("text_config") or r.config).get("vocab_size") for r in (reader, teacher_reader)]
    if vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"the teacher {teacher_name} has a vocabulary of {vocabularies[1]}, {directory} one of {vocabularies[0]}; the teacher must be the model that was converted, or one with its tokenizer"
        )
    if load_tokenizer(directory).get_vocab() != load_tokenizer(teacher_directory).get_vocab():
        raise ConfigError(
            f"the teacher {teacher_name} has another tokenizer than {directory}; the same ids mean other tokens there"
        )
    return _Opened(name or str(model), directory, reader, record, teacher_name, teacher_reader)


def _teacher_of(record: dict[str, Any], directory: Path) -> str:
    """The source that a manifest names; of an export, that of the model it was made from."""
    source = record.get("source")
    if isinstance(source, str):  # an export names the converted directory
        manifest = Path(source) / MANIFEST
        source = read_json(manifest).get("source") if manifest.is_file() else None
    if not isinstance(source, dict):
        raise ConfigError(f"{directory} does not say what it was converted from; name its --teacher")
    return str(source["name"])


def _started(work: Path) -> dict[str, Any]:
    """What the run in `work` was started with.

    Raises:
        HealingError: there is none, or it is of another version, whose settings were others.
    """
    if not (work / SETTINGS_FILE).is_file():
        raise HealingError(f"{work} holds no run to resume; start it without --resume")
    if _is_outdated(work):
        raise HealingError(
            f"{work} holds an unfinished run of another version of care-mla, which this one cannot go on with; start anew with --overwrite"
        )
    return read_json(work / SETTINGS_FILE)


def _is_outdated(work: Path) -> bool:
    """Whether the run in `work` is of a version of care-mla whose settings were others."""
    path = work / SETTINGS_FILE
    return path.is_file() and read_json(path).get("settings", {}).keys() != HealSettings.model_fields.keys()


def _prepare_work(
    work: Path, settings: HealSettings, opened: _Opened, started: dict[str, Any] | None, *, overwrite: bool
) -> None:
    """The directory of a run's state; what is in it must be of the same run.

    Args:
        started: what the run to resume was started with; None for a new run.

    Raises:
        HealingError
    """
    identity: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "model": opened.reader.fingerprint,
        "teacher": opened.teacher.fingerprint,
        "teacher_name": opened.teacher_name,
    }
    if started is not None:
        changed = [key for key, value in identity["settings"].items() if started["settings"].get(key) != value]
        changed += [key for key in ("model", "teacher") if started.get(key) != identity[key]]
        if changed:
            raise HealingError(
                f"the run in {work} was started with another {', '.join(changed)}; resume it without that option, or start anew with --overwrite"
            )
        return
    if not (work / REQUEST_FILE).is_file():  # else `convert_and_heal` has made it
        _require_no_run(work, overwrite)
        _make_work(work)
    write_json(work / SETTINGS_FILE, identity)


def _text(opened: _Opened, settings: HealSettings, work: Path, device: torch.device, track: Track) -> Blocks:
    """All blocks of the run, held-out ones included; made once, by the main process."""
    from care_mla.healing import Blocks, collect_blocks, on_main
    from care_mla.modeling import load
    from care_mla.text import embedding_rows, load_tokenizer
    from care_mla.text.specs import SELF, parse_spec

    path = work / BLOCKS_FILE

    def collect() -> None:
        if path.is_file():
            return
        from_model = any(part.name == SELF for part in parse_spec(settings.data))
        blocks = collect_blocks(
            settings.data,
            load_tokenizer(opened.directory),
            count=settings.num_steps * settings.batch_size + settings.eval_blocks,
            seqlen=settings.seqlen,
            seed=settings.seed,
            field=settings.field,
            model=load(opened.teacher.directory, device=device) if from_model else None,
            vocabulary=embedding_rows(opened.directory),
            track=track,
        )
        write_tensors(path, blocks.to_tensors())

    on_main(collect)
    return Blocks(**load_file(path))


def _make_run(
    opened: _Opened,
    settings: HealSettings,
    accelerator: Any,
    work: Path,
    teacher_logits: str | Path | None,
    track: Track,
) -> tuple[Run, Distillation, list[str]]:
    """Everything loaded and spread over the processes, and the names of the trained weights on disk."""
    from care_mla.calibration import checkpoint_layers
    from care_mla.healing import (
        Distillation,
        Run,
        autocast,
        family_of,
        held_out,
        is_bfloat16,
        key_of,
        make_pupil,
        parameter_groups,
        precondition,
        set_trained,
        share_teacher,
        shrink_frozen,
        spread,
        store,
        stored,
    )  # fmt: skip
    from care_mla.modeling import load

    train, evaluation = held_out(
        _text(opened, settings, work, accelerator.device, track), settings.eval_blocks, settings.seed
    )
    family, inner = family_of(opened.reader.config)
    pupil = make_pupil(load(opened.directory, dtype=torch.float32), family, inner=inner)
    shared = share_teacher(pupil, opened.reader, opened.teacher, settings.train)
    teacher = None if shared else load(opened.teacher.directory, dtype=torch.float32).requires_grad_(False)
    names = set_trained(pupil, settings.train)
    if absent := set(names) - set(opened.reader.names):
        raise ConfigError(
            f"--train {settings.train} trains {min(absent)}, which {opened.directory} stores in another form; use --train attention"
        )
    if settings.gradient_checkpointing:
        checkpoint_layers(pupil.model, pupil.decoder_layers())
    if is_bfloat16(accelerator.device, settings.precision) and not settings.shard:
        shrink_frozen(pupil, torch.bfloat16)
    distillation = Distillation(pupil, teacher, settings)
    measured = train[torch.linspace(0, len(train) - 1, min(len(train), SCALE_BLOCKS)).long()]

    def read_measured() -> None:
        with autocast(torch.device("cpu"), settings.precision):
            for row in torch.arange(len(measured)).split(1):
                distillation.student_logits(measured[row].input_ids.long(), measured[row].positions.long())

    precondition(distillation, work / SCALES_FILE, read_measured)
    module = spread(distillation, accelerator, shard=settings.shard)
    lr = settings.lr or settings.default_lr
    optimizer = torch.optim.AdamW(
        parameter_groups(module), lr=lr, betas=settings.betas, weight_decay=settings.weight_decay
    )
    top = None
    if settings.teacher_top_k:
        key = key_of(train, opened.teacher.fingerprint, settings.teacher_top_k, settings.temperature)
        path = Path(teacher_logits or work) / f"teacher-{key}.safetensors"
        accelerator.wait_for_everyone()
        top = stored(path)
        if top is None:

            def top_of(blocks: Blocks) -> tuple[Tensor, Tensor]:
                assert settings.teacher_top_k is not None
                device = accelerator.device
                with autocast(device, settings.precision):
                    return distillation.teacher_top(
                        blocks.input_ids.long().to(device), blocks.positions.long().to(device), settings.teacher_top_k
                    )

            top = store(train, path, settings.micro_batch_size or settings.batch_size, top_of, track)
    run = Run(module, optimizer, train, evaluation, top, settings, accelerator, work, work / METRICS, lr)
    return run, distillation, names


def _write(
    opened: _Opened,
    claimed: Claim,
    work: Path,
    pupil: Pupil,
    state: dict[str, Tensor],
    record: dict[str, Any],
) -> None:
    """The model's checkpoint with the trained weights in place of its own, its records and what travels with it.

    Args:
        state: trained weights under their names in `Distillation`.
    """
    from care_mla.healing import folded_in

    trained = {pupil.stored_name(name.removeprefix("model.")): tensor for name, tensor in state.items()}
    if pupil.folded:
        rank = opened.reader.config["kv_lora_rank"]
        trained = {name: folded_in(name, tensor, rank) for name, tensor in trained.items()}
    with claimed.staging(opened.reader.num_bytes) as staging:
        writer = ShardedWriter(staging)
        for name in opened.reader.names:
            tensor = opened.reader[name]
            writer.add(name, trained.pop(name).to(tensor.dtype) if name in trained else tensor)
        if trained:
            raise CheckpointError(f"{opened.directory} has no {min(trained)}, which was trained ({len(trained)} such)")
        writer.finish()
        copy_side_files(opened.directory, staging)
        copy_file(opened.directory / "config.json", staging / "config.json")
        copy_file(work / METRICS, staging / METRICS)
        write_json(staging / HEALING, record)
        if (opened.directory / EXPORT).is_file():
            copy_file(opened.directory / EXPORT, staging / EXPORT)
        if (opened.directory / MANIFEST).is_file():
            write_json(staging / MANIFEST, {**opened.record, "healing": [*opened.record.get("healing", []), record]})
            copy_file(opened.directory / SPECTRA, staging / SPECTRA)
            draw_report(staging)
