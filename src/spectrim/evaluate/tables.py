"""An evaluation report as tables for the terminal, and one model of it in Markdown."""

from math import log
from pathlib import Path

from rich.table import Table

from spectrim.checkpoint.card import code, plain
from spectrim.evaluate.results import DirectoryResult, EvaluationReport, VqaScore

_NONE = "–"


def table(report: EvaluationReport) -> Table:
    """One row per directory: accuracy per task, mean, difference to the reference, perplexity, size.

    Accuracies are in per cent, their difference in percentage points: paired, over all questions, with its 95 %
    interval below. Below a perplexity (per token) stands its difference to the reference, below a size its share of it.
    The reference comes first, the blind floor last. Nine tasks need a console of 120 columns.
    """
    results = sorted(report.results, key=lambda result: result.directory != report.reference)
    reference = next((result for result in results if result.directory == report.reference), None)
    tasks = next(([task.task for task in result.vqa.tasks] for result in results if result.vqa), [])
    with_text = any(result.perplexity for result in results)
    legend = "accuracy in %; Δ: paired difference over all questions, 95 % interval, p of McNemar's exact test"

    grid = Table(title="Evaluation", caption=legend if tasks else None, box=None, padding=(0, 1, 0, 0))
    grid.add_column("model", no_wrap=True)
    headings = [*tasks, "mean", "Δ"] if tasks else []
    for heading in [*headings, *(["ppl"] if with_text else []), "size"]:
        grid.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    for result, name in zip(results, _names([result.directory for result in results]), strict=True):
        row = [name]
        if tasks:
            row += [*_accuracies(result.vqa, len(tasks)), _difference(result)]
        if with_text:
            row.append(_perplexity(result, reference))
        grid.add_row(*row, _size(result, reference))
    if report.blind:
        grid.add_row("blind floor", *_accuracies(report.blind, len(tasks)), style="dim")
    return grid


def _names(directories: list[str]) -> list[str]:
    """Last path parts, or whole paths where those are not unique."""
    short = [Path(directory).name or directory for directory in directories]
    return short if len(set(short)) == len(short) else directories


def _accuracies(vqa: VqaScore | None, tasks: int) -> list[str]:
    if vqa is None:
        return [_NONE] * (tasks + 1)
    return [f"{100 * rate:.1f}" for rate in (*(task.accuracy for task in vqa.tasks), vqa.mean)]


def _difference(result: DirectoryResult) -> str:
    overall = next((row.difference for row in result.differences if row.task is None), None)
    if overall is None:
        return _NONE
    mean, low, high = (100 * value for value in (overall.mean, overall.low, overall.high))
    return f"{mean:+.1f} p={overall.p_value:.2g}\n[{low:+.1f}, {high:+.1f}]"


def _perplexity(result: DirectoryResult, reference: DirectoryResult | None) -> str:
    if result.perplexity is None:
        return _NONE
    own = result.perplexity.per_token
    if reference is None or reference is result or reference.perplexity is None:
        return f"{own:.2f}"
    return f"{own:.2f}\n{own - reference.perplexity.per_token:+.2f}"


def _size(result: DirectoryResult, reference: DirectoryResult | None) -> str:
    size = f"{result.bytes / 1e6:.1f} MB"
    return size if reference is None or reference is result else f"{size}\n{result.bytes / reference.bytes:.1%}"


def costs(report: EvaluationReport) -> Table:
    """One row per directory: speed of reading and answering, and peak memory (of the CUDA device, else the process)."""
    grid = Table(title="Cost", box=None, padding=(0, 1, 0, 0))
    for heading in ("model", "tokens/s", "questions/s", "peak memory"):
        grid.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for result, name in zip(report.results, _names([result.directory for result in report.results]), strict=True):
        tokens, peak = result.tokens_per_second, result.memory.peak_cuda or result.memory.peak_rss
        grid.add_row(
            name,
            _NONE if tokens is None else f"{tokens:,.0f}",
            _NONE if result.vqa is None else f"{result.vqa.questions_per_second:.1f}",
            _NONE if peak is None else f"{peak / 2**20:,.0f} MiB",
        )
    return grid


def losses(report: EvaluationReport) -> Table | None:
    """Predicted against measured increase of the text loss over the reference, nats per token; None without both."""
    reference = next((result for result in report.results if result.directory == report.reference), None)
    grid = Table(title="Text loss above the dense model, nats per token", box=None, padding=(0, 1, 0, 0))
    for heading in ("model", "predicted", "measured"):
        grid.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for result, name in zip(report.results, _names([result.directory for result in report.results]), strict=True):
        predicted = (result.predicted_loss or {}).get("text")
        if predicted is None or result.perplexity is None or reference is None or reference.perplexity is None:
            continue
        measured = log(result.perplexity.per_token) - log(reference.perplexity.per_token)
        grid.add_row(name, f"{predicted:.4f}", f"{measured:.4f}")
    return grid if grid.row_count else None


def divergences(report: EvaluationReport) -> Table | None:
    """Divergence from the reference by model and modality, beside what was predicted; None where none was measured.

    What the checkpoint predicts is the rise of the loss in nats per token, which the mean divergence measures.
    """
    if not any(result.divergence for result in report.results):
        return None
    legend = "KL divergence from the dense model, nats per token; mean with its 95 % interval, 99th percentile"
    grid = Table(title="Divergence from the dense model", caption=legend, box=None, padding=(0, 1, 0, 0))
    for heading in ("model", "of", "tokens", "mean", "99 %", "same token, %", "predicted"):
        grid.add_column(heading, justify="left" if heading in ("model", "of") else "right", no_wrap=True)
    for result, name in zip(report.results, _names([result.directory for result in report.results]), strict=True):
        forecasts = {what: (predicted, mean) for what, predicted, mean in result.forecasts}
        for row in result.divergence:
            predicted, _ = forecasts.pop(row.modality, (None, None))
            grid.add_row(
                name,
                row.modality,
                str(row.tokens),
                f"{row.mean:.4f}{_bounds(row.low, row.high, 1, 4)}",
                f"{row.p99:.3f}",
                f"{100 * row.agreement:.1f}{_bounds(row.agreement_low, row.agreement_high, 100, 1)}",
                _NONE if predicted is None else f"{predicted:.4f}",
            )
        for both, (expected, mean) in forecasts.items():  # of both modalities together
            grid.add_row(name, both, _NONE, f"{mean:.4f}", _NONE, _NONE, f"{expected:.4f}")
    return grid


def remarks(report: EvaluationReport) -> list[str]:
    """A sentence for each prediction that is off by more than a factor of two."""
    found = []
    for result, name in zip(report.results, _names([result.directory for result in report.results]), strict=True):
        for what, predicted, mean in result.forecasts:
            if mean < 1e-3 or 0.5 <= predicted / mean <= 2:
                continue
            how = f"{mean / max(predicted, 1e-9):.1f} times" if predicted < mean else "less than half of"
            found.append(
                f"{name}: the measured divergence of {what}, {mean:.3f} nats, is {how} the predicted {predicted:.3f}; "
                "trust the measured one"
            )
    return found


def _bounds(low: float | None, high: float | None, factor: float, digits: int) -> str:
    return "" if low is None or high is None else f" [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"


def markdown(report: EvaluationReport, result: DirectoryResult) -> str:
    """One model of a report beside the reference, for its model card: what was measured, on what, when and with what.

    Accuracies in per cent with their 95 % intervals, perplexity per token, bytes of the weights.
    """
    reference = next((x for x in report.results if x.directory == report.reference and x is not result), None)
    columns = {"this model": result, **({"dense": reference} if reference else {})}
    rows = []
    for index, task in enumerate(result.vqa.tasks if result.vqa else ()):
        scores = [x.vqa.tasks[index] for x in columns.values() if x.vqa]
        cells = [f"{100 * s.accuracy:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in scores]
        rows.append([f"{plain(task.task)}, % of {task.questions}", *cells])
    if result.vqa:
        rows.append(["mean of the tasks, %", *(f"{100 * x.vqa.mean:.1f}" for x in columns.values() if x.vqa)])
    if result.perplexity:
        cells = [f"{x.perplexity.per_token:.2f}" for x in columns.values() if x.perplexity]
        rows.append([f"perplexity, {result.perplexity.tokens} tokens", *cells])
    for shown in result.divergence:
        cells = [f"{shown.mean:.4f}", "0"][: len(columns)]
        rows.append([f"KL divergence from the dense model, {shown.modality}, nats per token", *cells])
        same = f"{100 * shown.agreement:.1f}"
        rows.append([f"the same token most likely, {shown.modality}, %", *[same, "100"][: len(columns)]])
    rows.append(["weights, MB", *(f"{x.bytes / 1e6:.1f}" for x in columns.values())])
    lines = ["", *columns], ["---"] * (1 + len(columns)), *rows
    sources = {"questions": report.questions, "text": report.text}
    said = "; ".join(
        f"{kind} {code(Path(source.name).name)}, SHA-256 {source.sha256[:12]}…"
        for kind, source in sources.items()
        if source
    )
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items() if number)
    settings = report.settings
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"By `spectrim evaluate` on {report.date[:10]}, in {result.dtype} on {result.device}, with 95 % intervals; "
            f"{said}; seed {settings.seed}, windows of {settings.seqlen} tokens; {versions}.",
        ]
    )
