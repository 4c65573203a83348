"""What ``--dry-run`` says: what a verb would read, gather and write."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.cli.console import is_standard, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectrim.anatomy import Anatomy
    from spectrim.calibrate.data import Data
    from spectrim.pipeline.jobs import Job
    from spectrim.samples import Modality
    from spectrim.settings import CalibrationOptions

Item = tuple[str, int | None] | tuple[str, int | None, str]
"""Something in words, its bytes where they are known, and how nearly they are: about, or at most."""


def would(read: Sequence[Item] = (), gather: Sequence[str] = (), write: Sequence[Item] = ()) -> None:
    """Say it, one line each, and that nothing of it was done."""
    from spectrim.estimate import amount

    for verb, items in (("read", read), ("gather", [(what, None) for what in gather]), ("write", write)):
        for what, nbytes, *nearly in items:
            show(f"would {verb:6} {what}{'' if nbytes is None else ': ' + ' '.join([*nearly, amount(nbytes)])}")
    show("dry run: nothing was run or written")


def model_item(source: str) -> Item:
    """The weight files of a model; of a hub id their bytes are not known. Raises ModelError where there are none."""
    from spectrim.checkpoint.sources import local_files
    from spectrim.checkpoint.weights import weight_files

    place = local_files(source)
    if place is None:
        return f"the model {source} of the Hugging Face hub, or of its cache here", None
    files = weight_files(place) if place.is_dir() else [place]
    return f"the model {source}", sum(file.stat().st_size for file in files)


def path_item(words: str, path: Path) -> Item:
    """A file or a folder with all that is in it."""
    from spectrim.calibrate.probe import written_bytes

    return f"{words} {path}", path.stat().st_size if path.is_file() else written_bytes(path)


def source_items(**sources: str | tuple[str, ...] | None) -> list[Item]:
    """Sources of samples, by what they are of; None for those that are not asked for."""
    from spectrim.samples.sources import local_path
    from spectrim.settings import counts

    found: list[Item] = []
    for kind, given in sources.items():
        for source in () if given is None else counts(given, 1):
            path = None if source == "builtin" else local_path(source)
            if path is not None:
                found.append(path_item(f"{kind} from", path))
            else:
                words = f"the built-in {kind}" if source == "builtin" else f"{kind} from the data set {source}"
                found.append((words, None))
    return found


def results_items(json: Path | None) -> list[Item]:
    """The file that ``--json`` names."""
    return [] if json is None or is_standard(json) else [(f"the results {json}", None)]


def shapes(source: str, *, dtype: Any, trust_remote_code: bool) -> "tuple[PreTrainedModel, Anatomy]":
    """A model without values, and its parts. Raises ModelError where the config makes none that can be compressed."""
    from spectrim.anatomy import anatomy
    from spectrim.checkpoint.read import load_empty

    model = load_empty(source, dtype=dtype, trust_remote_code=trust_remote_code)
    return model, anatomy(model)


def samples_of(
    source: str, model: "PreTrainedModel", parts: "Anatomy", options: "CalibrationOptions", *, trust_remote_code: bool
) -> "Data | None":
    """The samples of a calibration, checked like those of one that runs; None where they would have to be fetched.

    Raises SampleError for samples that are too few or do not fit the model.
    """
    from spectrim.calibrate.data import SAMPLE_SETTINGS, load_data
    from spectrim.checkpoint import load_processor
    from spectrim.samples.sources import local_path
    from spectrim.settings import counts

    sees = parts.tower is not None
    images = options.images if sees or options.images not in (None, "builtin") else None
    names = [name for given in (options.text, images) if given is not None for name in counts(given, 1)]
    if any(name != "builtin" and local_path(name) is None for name in names):
        return None
    processor = load_processor(source, trust_remote_code=trust_remote_code)
    chosen = options.model_dump(include=SAMPLE_SETTINGS)
    return load_data(model, processor, text=options.text, images=images, sees=sees, **chosen)


def calibration_items(
    source: str, options: "CalibrationOptions", out: Path, *, dtype: Any, trust_remote_code: bool
) -> "tuple[list[Item], list[str], list[Item], Any]":
    """What a calibration would read beside the model, gather, and write; and the model without values, with its parts.

    Raises SpectrimError as the calibration would, as far as that is known without running it.
    """
    from spectrim.calibrate.outlook import outlook

    model, parts = shapes(source, dtype=dtype, trust_remote_code=trust_remote_code)
    data = samples_of(source, model, parts, options, trust_remote_code=trust_remote_code)
    images = options.images if parts.tower is not None else None
    wanted: dict[Modality, str | tuple[str, ...] | None] = {"text": options.text, "image": images}
    fetched: dict[Modality, int] = {modality: options.samples for modality, name in wanted.items() if name}
    counts = fetched if data is None else data.samples
    what = ["moments of inputs"]
    what += ["moments of output gradients"] if options.curvature else []
    what += ["gradients of weights by text"] if options.gradients else []
    gather = [
        f"{' and '.join(what)} of {len(parts.linears)} linears from "
        + " and ".join(f"{count} {modality} samples" for modality, count in counts.items())
    ]
    passes, estimate = outlook(model, parts, data, options)
    several = ", ".join(f"{kind} in {count}" for kind, count in passes.items())
    gather.append(f"passes: {several}; about {estimate}")
    size = estimate.disk
    read = source_items(text=options.text, images=images)
    return read, gather, [(f"statistics {out}", size, "about")], (model, parts)


def compression_items(
    source: str, job: "Job", options: "CalibrationOptions", *, dtype: Any, trust_remote_code: bool
) -> tuple[list[Item], list[str], list[Item]]:
    """What a compression would read beside the model, gather, and write.

    Raises SpectrimError as the compression would, as far as that is known without running it.
    """
    from spectrim.pipeline.budget import Sizes

    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    read: list[Item] = []
    gather: list[str] = []
    write: list[Item] = []
    if job.kept is not None:
        read, gather, write, (model, parts) = calibration_items(source, options, job.kept, **how)
    else:
        model, parts = shapes(source, **how)
    if job.statistics is not None:
        read.append(path_item("statistics", job.statistics.path))
        write.append((f"what is computed of them, in {job.statistics.path}, where it is missing", None))
    if isinstance(job.plan, Path):
        read.append(path_item("the plan", job.plan))
    job.check_parts(model, parts)
    sizes = Sizes(model, parts)
    if job.plan is not None:
        most = [sizes.of(job.fitted_plan(parts))] * len(job.targets)
    else:
        most = [sizes.fixed + budget.linear_bytes(sizes) for budget in job.budgets]
    places = zip(job.targets, most, strict=True)
    write += [(f"the weights of the checkpoint {target}", size, "at most") for target, size in places]
    return read, gather, write
