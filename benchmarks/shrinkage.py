"""How far an expert's moments should be drawn to its layer's mean: divergence on left-out samples by the constant.

    python benchmarks/shrinkage.py MODEL [--samples 4,16] [--constants 0.0005,0.004,0.03,0.125]

For each number of calibration samples and each constant: KL divergence from the dense model, nats per position, on
other samples of the calibration's sources (text, image), of two recipes at one size each. No test data is read.
"""

import argparse
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

import spectrim
from spectrim.calibrate import Statistics, calibrate, experts
from spectrim.calibrate.data import load_data
from spectrim.calibrate.passes import model_inputs
from spectrim.pipeline import compression

CASES = (("jw-svd", 0.45), ("laser", 0.45))
LEFT_OUT = 16  # samples of each modality


@torch.no_grad()
def log_probabilities(model, batches):
    """By modality, of all positions of all batches."""
    found = {}
    for batch in batches:
        logits = model(**model_inputs(model, batch)).logits.float().log_softmax(-1)
        found.setdefault(batch.modality, []).append(logits.flatten(0, 1))
    return {modality: torch.cat(parts) for modality, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", default="4,16")
    parser.add_argument("--constants", default="0.0005,0.004,0.03,0.125")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model, processor = spectrim.load(args.model), spectrim.load_processor(args.model)
    source = {"text": "builtin", "images": "builtin", "seqlen": 64, "instruction": "Describe this image."}
    other = load_data(model, processor, samples=LEFT_OUT, seed=1, sees=True, **source)
    batches = [batch for modality in other.samples for batch in other.batches(modality, 8)]
    dense = None
    print("| samples | constant | " + " | ".join(f"{r} {q:.0%} text | image" for r, q in CASES) + " |", flush=True)
    print("|---" * (2 + 2 * len(CASES)) + "|", flush=True)
    for samples in map(int, args.samples.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            first = Path(folder, "first")
            calibrate(model, first, processor=processor, samples=samples, seed=0, **source)
            dense = log_probabilities(model, batches) if dense is None else dense
            for constant in map(float, args.constants.split(",")):
                experts.SHRINKAGE = constant
                path = Path(folder, str(constant))  # spectra are kept beside statistics, and do not know the constant
                shutil.copytree(first, path)
                Statistics.open(path)
                cells = []
                for recipe, retain in CASES:
                    changes = {"compensate.kind": "none"}
                    with (
                        compression(model, recipe, stats=path, processor=processor, changes=changes) as prepared,
                        prepared.applied(prepared.plan(retain)) as small,
                    ):
                        found = log_probabilities(small, batches)
                    for modality, p in dense.items():
                        cells.append(f"{float((p.exp() * (p - found[modality])).sum(-1).mean()):.4f}")
                print(f"| {samples} | {constant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
