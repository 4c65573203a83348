"""What a latent cache costs in quality and in time: the built-in model by LASER, and steps of a random Llama.

    python benchmarks/latent_cache.py OUT                       # both tables
    python benchmarks/latent_cache.py OUT --only time --dtype bfloat16

Quality: perplexity of held-out text that is read in chunks, and VQA accuracy where the last tokens of the question and
the answer are read after the rest; whatever is read later sees the tokens before it through the cache alone. OUT takes
statistics and checkpoints, and those that are there already are used. Time: steps of one token with so many tokens in
the cache, of all caches in turn; the fastest counts, since other load on the machine only ever adds.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.evaluate import Question, load_questions
from spectrim.evaluate.answering import Answer, prompted
from spectrim.evaluate.language import read_text
from spectrim.latent import LatentCache
from spectrim.pipeline import compression
from spectrim.samples import load_text
from spectrim.samples.batches import model_tensors
from spectrim.storage import exchange

Make = Callable[[Any], Any]
CACHES: dict[str, Make] = {
    "ordinary": lambda model: DynamicCache(config=model.config.get_text_config()),
    "latents": LatentCache,
    "latents, int8": lambda model: LatentCache(model, "int8"),
}
LATER = 6  # tokens of a prompt that are read after the others


def size(past: Any) -> int:
    """Bytes of a cache."""
    if isinstance(past, LatentCache):
        return past.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)


@torch.inference_mode()
def perplexity(
    model: Any, tokenizer: Any, text: str, make: Make, *, chunk: int, max_tokens: int
) -> tuple[float, float]:
    """Perplexity per token over windows of 256 that are read in chunks, and bytes of the cache per token."""
    reading = read_text(model.config, tokenizer, text, seqlen=256, stride=None, max_tokens=max_tokens)
    nll, held = 0.0, 0.0
    for first in range(0, len(reading.windows), 8):
        group = reading.windows[first : first + 8]
        inputs, past = reading.inputs(group), make(model)
        parts = [model(input_ids=ids, past_key_values=past).logits for ids in inputs.split(chunk, dim=1)]
        for window, row in zip(group, torch.cat(parts, dim=1), strict=True):
            targets = reading.stream[window.score + 1 : window.end + 1]
            nll += cross_entropy(row[-len(targets) :].float(), targets, reduction="sum").item()
        held = size(past) / inputs.numel()
    return float(torch.tensor(nll / reading.windows[-1].end).exp()), held


@torch.inference_mode()
def accuracy(model: Any, processor: Any, questions: list[Question], make: Make) -> float:
    """Share of right answers; the cache holds the image and all but the last tokens of a question before those."""
    prompts, right = prompted(processor, model.config, questions), 0
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), 40):
        batch = order[first : first + 40]
        given = [prompts[i] for i in batch], [[questions[i].image] for i in batch], ["a question"] * len(batch)
        inputs: Any = model_tensors(processor, *given, padding=True, padding_side="left").to(dtype=model.dtype)
        past, words = make(model), {name: inputs[name] for name in ("input_ids", "attention_mask")}
        early = {name: x[:, :-LATER] for name, x in words.items()}
        model(**early, pixel_values=inputs["pixel_values"], past_key_values=past)
        how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
        found = model.generate(**words, past_key_values=past, **how)[:, words["input_ids"].shape[1] :]
        for i, said in zip(batch, processor.tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
            right += Answer(questions[i].task, questions[i].question, questions[i].answer, said.strip()).correct
    return right / len(questions)


def quality(args: argparse.Namespace) -> None:
    """Print the table of the built-in model."""
    source, text = resolve("demo"), load_text("builtin", split="heldout")
    processor, questions = load_processor(source), load_questions("builtin", args.questions, 0)
    dense = load(source)
    made = calibrate(
        dense, args.out / "statistics", processor=processor, samples=192, seqlen=128, batch_size=32, curvature=True
    )
    print(
        "| budget | ranks of k and v, of 64 | cache | perplexity | VQA, % | bytes a token |\n|---|---|---|---|---|---|"
    )
    for retain in (float(part) for part in args.retain.split(",")):
        target = args.out / f"laser-{retain:.0%}"
        if not target.exists():
            with compression(dense, "laser", stats=made, processor=processor) as prepared:
                prepared.save(prepared.plan(retain), target, processor=source)
        model = load(target, dtype=torch.float32)
        sites = [layer.site for layer in LatentCache(model).layers if hasattr(layer, "site")]
        ranks = [
            f"{sum(sum(x) for x in each) / sum(map(len, each)):.0f}"
            for each in zip(*(s.ranks for s in sites), strict=True)
        ]
        for name, make in CACHES.items():
            found, held = perplexity(
                model, processor.tokenizer, text, make, chunk=args.chunk, max_tokens=args.max_tokens
            )
            share = 100 * accuracy(model, processor, questions, make)
            kind = f"{retain:.0%} | {' and '.join(ranks)} in {len(sites)} layers | {name}"
            print(f"| {kind} | {found:.3f} | {share:.1f} | {held:.0f} |", flush=True)


def random_llama(rank: int, dtype: torch.dtype) -> Any:
    """Four layers of width 1024 with 8 query and 2 key/value heads of 128, and keys and values of this rank by head."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=1 << 17,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).to(dtype).eval()
    names = [name for name, _ in model.named_modules() if name.endswith(("k_proj", "v_proj"))]
    exchange(model, {name: ("low-rank", {"rank": [rank] * 2, "pivoted": False}) for name in names})
    with torch.no_grad():
        for name in names:
            for parameter in model.get_submodule(name).parameters():
                parameter.normal_(std=0.05)
    return model


@torch.inference_mode()
def products(past: LatentCache, repeats: int) -> float:
    """Milliseconds of the products alone that rebuild the keys of all layers from latents, in tiles and float32."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for layer in past.layers:
            for z in layer.z_k.held.split(layer.site.ranks[0], dim=2):
                up = torch.zeros(z.shape[2], layer.site.module.head_dim)
                for part in z.split(1024, dim=1):
                    _ = part.float() @ up
        best = min(best, 1e3 * (time.perf_counter() - started))
    return best


@torch.inference_mode()
def timing(args: argparse.Namespace) -> None:
    """Print the table of steps."""
    dtype = getattr(torch, args.dtype)
    print(
        f"{args.dtype}, batch {args.batch}, {torch.get_num_threads()} threads; ms a step, and × the ordinary cache's\n"
    )
    print(f"| rank | tokens | {' | '.join(f'{name} | MB' for name in CACHES)} |\n|---|---|{'---|---|' * len(CACHES)}")
    for rank in (int(part) for part in args.ranks.split(",")):
        model = random_llama(rank, dtype)
        for tokens in (int(part) for part in args.tokens.split(",")):
            caches, times = {name: make(model) for name, make in CACHES.items()}, {name: [] for name in CACHES}
            for past in caches.values():
                for ids in torch.randint(0, 512, (args.batch, tokens)).split(512, dim=1):
                    model(input_ids=ids, past_key_values=past, logits_to_keep=1)
            for turn in range(args.repeats + 1):
                for name, past in caches.items():
                    started = time.perf_counter()
                    model(input_ids=torch.ones(args.batch, 1, dtype=torch.long), past_key_values=past)
                    if turn:
                        times[name].append(1e3 * (time.perf_counter() - started))
            best = {name: min(values) for name, values in times.items()}
            cells = [
                f"{best[name]:.1f} (× {best[name] / best['ordinary']:.2f}) | {size(past) / 1e6:.1f}"
                for name, past in caches.items()
            ]
            cells.append(f"{products(caches['latents'], args.repeats):.1f}")
            print(f"| {rank} | {tokens} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("quality", "time"))
    parser.add_argument("--retain", default="0.4,0.3")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ranks", default="32,48,64")
    parser.add_argument("--tokens", default="512,2048,8192")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if args.only != "time":
        quality(args)
    if args.only != "quality":
        timing(args)


if __name__ == "__main__":
    main()
