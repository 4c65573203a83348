"""Recovery fine-tuning: LoRA on the factors of the built-in model, compressed until its VQA accuracy drops.

    python examples/recover.py OUT

Compresses the built-in model by text-only whitening, trains adapters on its factors with questions and text of the
training split, merges them, and evaluates the dense, the compressed and the recovered model on the test split. The
recovered checkpoint has the ranks and the bytes of the compressed one. Needs the extra `peft`.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

import spectrim
from spectrim.checkpoint import read_provenance
from spectrim.demo import resolve
from spectrim.demo.tasks import TASKS, stream
from spectrim.demo.text import split_text
from spectrim.evaluate import evaluate, table
from spectrim.samples.batches import image_prompt

SEED = 1  # of the training streams; the test split has streams of its own
TEXT_WINDOW = 128  # tokens
TEXT_WEIGHT = 0.5


def questions(processor: Any, size: int) -> Any:
    """Endless batches of questions with their answers; only answers are labels."""
    streams = [stream(task, "train", SEED) for task in TASKS]
    end = processor.tokenizer.eos_token
    number = 0
    while True:
        asked = [next(streams[(number + i) % len(streams)]) for i in range(size)]
        number += size
        inputs = processor(
            text=[image_prompt(processor, q.question) + q.answer + end for q in asked],
            images=[[q.image] for q in asked],
            padding=True,
            padding_side="left",  # so that every answer ends where its row ends
            return_tensors="pt",
        )
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, question in enumerate(asked):
            length = len(processor.tokenizer(question.answer + end).input_ids)
            labels[row, -length:] = inputs["input_ids"][row, -length:]
        yield {**inputs, "labels": labels}


def texts(processor: Any, size: int) -> Any:
    """Endless batches of random windows of the training text."""
    ids = processor.tokenizer(split_text("train"), return_tensors="pt", verbose=False).input_ids[0]
    generator = torch.Generator().manual_seed(SEED)
    while True:
        starts = torch.randint(len(ids) - TEXT_WINDOW, (size, 1), generator=generator)
        windows = ids[starts + torch.arange(TEXT_WINDOW)]
        yield {"input_ids": windows, "labels": windows}


def train(model: Any, processor: Any, args: argparse.Namespace) -> None:
    """Train the adapters, the only parameters that take gradients; the rate falls to nothing with half a cosine."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.0)
    pictures, windows = questions(processor, args.batch), texts(processor, 2)
    began = time.perf_counter()
    model.train()
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 20)
        optimizer.param_groups[0]["lr"] = args.rate * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        answers, language = model(**next(pictures)).loss, model(**next(windows)).loss
        (answers + TEXT_WEIGHT * language).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            spent = time.perf_counter() - began
            print(f"step {step + 1}: answers {answers:.3f}, text {language:.3f}, {spent:.0f} s", flush=True)
    model.eval()


def main() -> None:
    """Compress, train, merge, save, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="svd-llm")
    parser.add_argument("--retain", type=float, default=0.4)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=40, help="test questions of each task")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    compressed, recovered = args.out / "compressed", args.out / "recovered"
    spectrim.compress("demo", compressed, recipe=args.recipe, retain=args.retain, seqlen=128, overwrite=True)

    small = spectrim.load(compressed, dtype=torch.float32)
    processor = spectrim.load_processor(compressed)
    targets = spectrim.lora_targets(small)
    model = get_peft_model(small, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    model.print_trainable_parameters()
    train(model, processor, args)
    merged = model.merge_and_unload().to(torch.bfloat16)
    note = {"fine_tuned": {"steps": args.steps, "batch": args.batch, "adapter_rank": args.rank, "seed": SEED}}
    spectrim.save(
        merged, recovered, processor=compressed, provenance={**read_provenance(compressed), **note}, overwrite=True
    )

    paths = [resolve("demo"), compressed, recovered]
    report = evaluate(paths, samples=args.samples, max_tokens=8192, seqlen=256, dtype=torch.float32)
    report.write(args.out / "results.json")
    Console(width=120).print(table(report))


if __name__ == "__main__":
    main()
