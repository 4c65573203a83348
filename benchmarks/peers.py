"""Other quantizers on the same model, calibration tokens, stored bytes and evaluation; `peers.sh` runs all of it.

    python benchmarks/peers.py prepare MODEL WORK --text calibration.txt --samples 128 --seqlen 512
    python benchmarks/peers.py quantize WORK gptq --bits 3 --group 64      # in the environment of llm-compressor
    python benchmarks/peers.py quantize WORK autoround --bits 3 --group 64  # in that of AutoRound
    python benchmarks/peers.py compare WORK --text heldout.txt

`prepare` writes the dense model in float32 and the samples as tensors, so that no peer tokenizes or draws its own.
`quantize` imports no spectrim. It writes a dense model whose linears hold the rounded weights, so that one program
evaluates all, and how many bytes the integers with 16-bit scales would take. `compare` compresses by spectrim to the
same bytes, evaluates all in float32, and writes WORK/peers.json and a table. Embeddings and heads stay dense in all.
"""

import argparse
import json
import math
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SCALE_BITS = 16
PEERS = {"gptq": "llmcompressor", "awq": "llmcompressor", "rtn": None, "autoround": "auto-round"}


def prepare(args: argparse.Namespace) -> None:
    """The dense model and the calibration samples, text before images."""
    from spectrim.calibrate.data import load_data
    from spectrim.checkpoint import load, load_processor
    from spectrim.demo import resolve
    from spectrim.files import write_whole

    source = resolve(args.model)
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    model.save_pretrained(args.work / "dense")
    processor.save_pretrained(args.work / "dense")
    given: dict[str, Any] = {"samples": args.samples, "seqlen": args.seqlen, "seed": 0}
    sees = args.images is not None
    data = load_data(
        model, processor, text=args.text, images=args.images, sees=sees, instruction="Describe the image.", **given
    )
    folder = args.work / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for modality in data.samples:
        for batch in data.batches(modality, 1):
            tensors = {name: value.contiguous() for name, value in batch.inputs.items() if torch.is_tensor(value)}
            save_file(tensors, folder / f"{number:05}.safetensors")
            number += 1
    content = {"model": str(args.model), "text": str(args.text), "images": args.images, **given, "count": number}
    write_whole(args.work / "samples.json", json.dumps(content, indent=2).encode())


def quantize(args: argparse.Namespace) -> None:
    """The linears of all blocks rounded by one peer."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    home = args.work / "dense"
    config = json.loads((home / "config.json").read_text())
    kind: Any = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model = kind.from_pretrained(home, dtype=torch.float32)
    # Images first: what a peer learns of a model from one sample is of the whole model then.
    samples = [load_file(path) for path in sorted((args.work / "samples").glob("*.safetensors"), reverse=True)]
    names = [
        name for name, module in model.named_modules() if type(module) is torch.nn.Linear and "lm_head" not in name
    ]
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    started = time.perf_counter()
    if args.peer == "rtn":
        for name in names:
            weight = model.get_submodule(name).weight
            weight.data = nearest(weight.data, args.bits, args.group)
    elif args.peer == "autoround":
        model = autoround(model, samples, args)
    else:
        llmcompressor(model, samples, args)
    seconds = time.perf_counter() - started
    bits = 0
    for name in names:
        weight = model.get_submodule(name).weight
        rows, columns = weight.shape
        groups = columns // args.group if columns % args.group == 0 else 1
        changed = not torch.equal(weight.float(), before[name].float())
        bits += rows * columns * args.bits + rows * groups * SCALE_BITS if changed else rows * columns * SCALE_BITS
        if changed:
            check(weight, args.bits, columns // groups)
    out = args.work / f"{args.peer}-{args.bits}-{args.group}"
    plain = kind.from_pretrained(home, dtype=torch.float32)  # without what a peer leaves on its modules
    for name, parameter in plain.named_parameters():  # AWQ moves scales into norms
        parameter.data = model.get_parameter(name).detach().float().clone()
    plain.save_pretrained(out)
    for file in home.iterdir():
        if file.suffix != ".safetensors" and not (out / file.name).exists():
            (out / file.name).write_bytes(file.read_bytes())
    package = PEERS[args.peer]
    record = {
        "peer": args.peer, "bits": args.bits, "group": args.group, "bytes": bits // 8, "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", *([package] if package else []))},
    }  # fmt: skip
    (out / "peer.json").write_text(json.dumps(record, indent=2))
    print(json.dumps(record))


def nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Rounded to the nearest multiple of one scale for each group, symmetric."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, group if columns % group == 0 else columns)
    top = 2 ** (bits - 1)
    scale = (blocks.abs().amax(-1, keepdim=True) / (top - 0.5)).clamp_min(1e-12)
    return ((blocks / scale).round().clamp(-top, top - 1) * scale).reshape(rows, columns)


def check(weight: torch.Tensor, bits: int, group: int) -> None:
    """Stop where a group holds more values than so many bits can name: the peer stored something else."""
    for row in weight.reshape(-1, group)[:64]:
        if len(row.double().div(row.abs().max().clamp_min(1e-12)).mul(1e4).round().unique()) > 2**bits:
            raise SystemExit(f"a group holds more than {2**bits} values; its bytes are not those of {bits} bits")


def llmcompressor(model: Any, samples: list[dict[str, torch.Tensor]], args: argparse.Namespace) -> None:
    """GPTQ or AWQ of llm-compressor with its defaults; the weights are rounded in place.

    Where some samples have images and some have none, layers are not calibrated one after another, on rounded inputs:
    its sequential pipeline traces one sample, and refuses those that lack one of its inputs.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader

    if not torch.cuda.is_available():  # AWQ pins memory, which is refused where there is no accelerator
        torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign,assignment]
    weights = QuantizationArgs(
        num_bits=args.bits, type="int", symmetric=True, strategy="group", group_size=args.group, dynamic=False
    )
    groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[args.peer](config_groups=groups, ignore=["re:.*lm_head"])
    loader = DataLoader(samples, batch_size=None)
    how = "sequential" if len({frozenset(sample) for sample in samples}) == 1 else "basic"
    oneshot(model=model, dataset=loader, recipe=[modifier], num_calibration_samples=len(samples), pipeline=how)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight_scale"):
                how = module.quantization_scheme.weights
                zero = getattr(module, "weight_zero_point", None)
                module.weight.data = fake_quantize(module.weight, module.weight_scale, zero, how)


def autoround(model: Any, samples: list[dict[str, torch.Tensor]], args: argparse.Namespace) -> Any:
    """AutoRound's light setting: 50 steps for each block, a learning rate of 0.005."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.work / "dense")
    windows = [sample["input_ids"] for sample in samples if "pixel_values" not in sample]
    tuned = AutoRound(
        model, tokenizer=tokenizer, bits=args.bits, group_size=args.group, sym=True, iters=args.iters, lr=5e-3,
        dataset=windows, nsamples=len(windows), seqlen=windows[0].shape[-1], batch_size=8, device_map="cpu",
        enable_torch_compile=False,
    )  # fmt: skip
    found, _ = tuned.quantize()
    return found


def compare(args: argparse.Namespace) -> None:
    """spectrim at the bytes of every peer, and the evaluation of all; linears count in 16 bits, others not at all."""
    from recipes import stored_in
    from spectrim.calibrate import calibrate
    from spectrim.checkpoint import load, load_processor
    from spectrim.evaluate import load_questions, perplexity, vqa
    from spectrim.evaluate.results import score
    from spectrim.files import parse_yaml
    from spectrim.recipe import Recipe
    from spectrim.samples import load_text

    home, settings = args.work / "dense", json.loads((args.work / "samples.json").read_text())
    model, processor = load(home, dtype=torch.float32), load_processor(home)
    tokenizer, text = getattr(processor, "tokenizer", processor), load_text(args.text, split="heldout")
    questions = load_questions("builtin", samples=args.questions, seed=0) if settings["images"] else None

    def measured(one: Any) -> dict[str, float | None]:
        found = perplexity(one, tokenizer, text, seqlen=args.window, max_tokens=args.max_tokens).per_token
        began = time.perf_counter()
        answers = None if questions is None else vqa(one, processor, questions)
        seen = None if answers is None else score(answers, time.perf_counter() - began).mean
        return {"perplexity": found, "vqa": seen}

    rows: list[dict[str, Any]] = [{"method": "dense", "bits": 16.0, "seconds": None, **measured(model)}]
    records = {path.parent: json.loads(path.read_text()) for path in sorted(args.work.glob("*/peer.json"))}
    chosen: dict[str, Any] = {name: settings[name] for name in ("text", "images", "samples", "seqlen", "seed")}
    started = time.perf_counter()
    statistics = calibrate(model, args.work / "statistics", processor=processor, **chosen)
    gathered = time.perf_counter() - started  # of all sizes together; nothing where it was there
    changes: dict[str, Any] = {"quantize.bits": "auto", "quantize.group": args.group}
    recipe = Recipe.read("spectrim", changes | {key: parse_yaml(value.encode()) for key, value in args.set})
    prepared = stored_in(torch.bfloat16, model, recipe, statistics, processor)
    dense = sum(linear.nbytes for linear in prepared.parts.linears)
    for folder, record in records.items():
        other = load(folder, dtype=torch.float32)
        row = {"method": folder.name, "bits": 16 * record["bytes"] / dense, "seconds": record["seconds"]}
        rows.append(row | measured(other))
        del other
    for size in sorted({record["bytes"] for record in records.values()}):
        started = time.perf_counter()
        plan = prepared.plan(size / dense)
        with prepared.applied(plan) as small:
            seconds = time.perf_counter() - started + gathered
            rows.append({"method": "spectrim", "bits": 16 * plan.bytes / dense, "seconds": seconds} | measured(small))
    versions = {name: version(name) for name in ("spectrim", "torch", "transformers")}
    content = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions, "samples": settings}
    (args.work / "peers.json").write_text(json.dumps(content | {"rows": rows}, indent=2))
    print("| method | bits per weight | perplexity | excess nats | VQA accuracy | seconds |\n|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row["bits"]):
        excess = math.log(row["perplexity"] / rows[0]["perplexity"])
        seen = "–" if row["vqa"] is None else f"{100 * row['vqa']:.1f}"
        took = "–" if row["seconds"] is None else f"{row['seconds']:.0f}"
        print(f"| {row['method']} | {row['bits']:.3f} | {row['perplexity']:.2f} | {excess:.3f} | {seen} | {took} |")
    print(f"\n{content['date']}, {', '.join(f'{k} {v}' for k, v in versions.items())}, seed 0")


def main() -> None:
    """Parse the command line and run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("prepare")
    step.add_argument("model")
    step.add_argument("work", type=Path)
    step.add_argument("--text", default="builtin")
    step.add_argument("--images", default=None, help="'builtin' for the built-in model")
    step.add_argument("--samples", type=int, default=128)
    step.add_argument("--seqlen", type=int, default=512)
    step.set_defaults(run=prepare)
    step = steps.add_parser("quantize")
    step.add_argument("work", type=Path)
    step.add_argument("peer", choices=PEERS)
    step.add_argument("--bits", type=int, required=True)
    step.add_argument("--group", type=int, required=True)
    step.add_argument("--iters", type=int, default=50, help="of AutoRound")
    step.set_defaults(run=quantize)
    step = steps.add_parser("compare")
    step.add_argument("work", type=Path)
    step.add_argument("--text", default="builtin", help="held-out text")
    step.add_argument("--window", type=int, default=1024)
    step.add_argument("--max-tokens", type=int, default=10240)
    step.add_argument("--group", type=int, default=64)
    step.add_argument("--questions", type=int, default=100, help="of each task")
    step.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="of the recipe")
    step.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
