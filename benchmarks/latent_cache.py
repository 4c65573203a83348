"""What a latent cache costs in quality and in time.

    python benchmarks/latent_cache.py OUT                       # the built-in model, and steps of a random Llama
    python benchmarks/latent_cache.py OUT --only quality --made laser:0.4,laser+gptq:0.2 --contexts 512,2048,8192
    python benchmarks/latent_cache.py OUT --only quality --model MODEL.gguf --text TEXT --heldout HELDOUT --window 512
    python benchmarks/latent_cache.py OUT --only tokens --dtype bfloat16
    python benchmarks/latent_cache.py OUT --only time --dtype bfloat16

Quality: perplexity of held-out text that is read in chunks, and VQA accuracy where the last tokens of the question and
the answer are read after the rest; whatever is read later sees the tokens before it through the cache alone. With
`--contexts`, steps of one token with so many tokens in the cache, too. OUT takes statistics and checkpoints, and those
that are there already are used. Tokens: greedy ones by every cache, and by how much the first that differ do. Time:
steps of all caches in turn. Steps are CPU time of this process, the least of several, since other load on the machine
only ever adds.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
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
from spectrim.latent.attention import sites
from spectrim.latent.cache import LatentLayer
from spectrim.pipeline import compression
from spectrim.samples import load_text
from spectrim.samples.batches import model_tensors
from spectrim.storage import exchange

Make = Callable[[Any], Any]
CACHES: dict[str, Make] = {
    "ordinary": lambda model: DynamicCache(config=model.config.get_text_config()),
    "latents": LatentCache,
    "latents, int8": lambda model: LatentCache(model, "int8"),
    "latents, folded": lambda model: LatentCache(model, folded=True),
}
LATER = 6  # tokens of a prompt that are read after the others


def size(past: Any) -> int:
    """Bytes of a cache."""
    if isinstance(past, LatentCache):
        return past.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)


@torch.inference_mode()
def perplexity(
    model: Any, tokenizer: Any, text: str, make: Make, *, chunk: int, window: int, max_tokens: int
) -> tuple[float, float]:
    """Perplexity per token over windows that are read in chunks, and bytes of the cache per token."""
    reading = read_text(model.config, tokenizer, text, seqlen=window, stride=None, max_tokens=max_tokens)
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
        early["position_ids"] = (early["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
        model(**early, pixel_values=inputs["pixel_values"], past_key_values=past)
        how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}
        found = model.generate(**words, past_key_values=past, **how)[:, words["input_ids"].shape[1] :]
        for i, said in zip(batch, processor.tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
            right += Answer(questions[i].task, questions[i].question, questions[i].answer, said.strip()).correct
    return right / len(questions)


def made(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Names and directories of the compressed models, which are made where they are not there yet."""
    source = resolve(args.model)
    dense, processor = load(source, dtype=torch.float32), load_processor(source)
    statistics = calibrate(
        dense, args.out / "statistics", processor=processor, text=args.text, samples=args.samples, seqlen=args.seqlen,
        batch_size=args.batch_size, curvature=True,
    )  # fmt: skip
    for recipe, _, retain in (part.partition(":") for part in args.made.split(",")):
        target = args.out / f"{recipe}-{float(retain):.0%}"
        if not target.exists():
            with compression(dense, recipe, stats=statistics, processor=processor) as prepared:
                prepared.save(prepared.plan(float(retain)), target, processor=source)
        yield f"{recipe} | {float(retain):.0%}", target


def megabytes(model: Any) -> float:
    """Of all tensors of a model as they are stored, shared ones once."""
    return sum({x.data_ptr(): x.nbytes for x in model.state_dict().values()}.values()) / 1e6


def ranks(model: Any) -> str:
    """Means over heads and layers, of keys and of values."""
    sites = [layer.site for layer in LatentCache(model).layers if isinstance(layer, LatentLayer)]
    sides = zip(*(site.ranks for site in sites), strict=True)
    return (
        " and ".join(f"{sum(map(sum, side)) / sum(map(len, side)):.0f}" for side in sides) + f" in {len(sites)} layers"
    )


def quality(args: argparse.Namespace) -> None:
    """Print the table of a model and of what was made of it."""
    source, text, dtype = resolve(args.model), load_text(args.heldout, split="heldout"), getattr(torch, args.dtype)
    processor = load_processor(source)
    tokenizer, sees = getattr(processor, "tokenizer", processor), hasattr(processor, "image_processor")
    questions = load_questions("builtin", args.questions, 0) if sees else []
    contexts = [int(part) for part in args.contexts.split(",") if part]
    head = ["recipe", "budget", "weights, MB", "ranks of k and v", "cache", "perplexity", *["VQA, %"] * sees]
    head += ["bytes a token", *(f"ms at {tokens}" for tokens in contexts)]
    print(
        f"{args.dtype}, {torch.get_num_threads()} threads\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True
    )
    for name, directory in chain([("dense | 100%", source)], made(args)):
        model = load(directory, dtype=dtype)
        kind = f"{name} | {megabytes(model):.1f} | {'' if directory == source else ranks(model)}"
        how = {"chunk": args.chunk, "window": args.window, "max_tokens": args.max_tokens}
        caches = {cache: make for cache, make in CACHES.items() if cache == "ordinary" or directory != source}
        times = steps(model, caches, contexts, args)
        for cache, make in caches.items():
            if cache.endswith("folded"):  # the same numbers up to rounding
                continue
            found, held = perplexity(model, tokenizer, text, make, **how)
            cells = [kind, cache, f"{found:.3f}"]
            cells += [f"{100 * accuracy(model, processor, questions, make):.1f}"] if sees else []
            cells += [f"{held:.0f}", *(f"{each:.1f}" for each, _ in times[cache])]
            print(f"| {' | '.join(cells)} |", flush=True)
        if contexts and directory != source:
            cells = [
                kind,
                "latents, folded",
                *[""] * (2 + sees),
                *(f"{each:.1f}" for each, _ in times["latents, folded"]),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def steps(
    model: Any, caches: dict[str, Make], contexts: list[int], args: argparse.Namespace
) -> dict[str, list[tuple[float, int]]]:
    """Milliseconds of a step by cache and the bytes of the cache, for each number of tokens before it."""
    best: dict[str, list[tuple[float, int]]] = {name: [] for name in caches}
    vocabulary = model.get_input_embeddings().num_embeddings
    for tokens in contexts:
        filled = {name: make(model) for name, make in caches.items()}
        for past in filled.values():
            for ids in torch.randint(vocabulary // 4, vocabulary // 2, (args.batch, tokens)).split(512, dim=1):
                model(input_ids=ids, past_key_values=past, logits_to_keep=1)
        times: dict[str, list[float]] = {name: [] for name in caches}
        ids = torch.full((args.batch, 1), vocabulary // 3)
        for turn in range(args.repeats + 1):
            for name, past in filled.items():
                started = time.process_time()
                model(input_ids=ids, past_key_values=past)
                if turn:
                    times[name].append(1e3 * (time.process_time() - started))
        for name, past in filled.items():
            best[name].append((min(times[name]), size(past)))
    return best


@torch.inference_mode()
def greedy(args: argparse.Namespace) -> None:
    """Print how many prompts have the same greedy tokens with every cache, and what differs first in the others."""
    source, text = resolve(args.model), load_text(args.heldout, split="heldout")
    processor = load_processor(source)
    prompts: list[Any] = []
    if hasattr(processor, "image_processor"):
        for question in load_questions("builtin", 2, 0):
            words = prompted(processor, load(source).config, [question])
            prompts.append(model_tensors(processor, words, [[question.image]], ["a question"]))
    else:
        ids = processor(text, return_tensors="pt")["input_ids"][0, : 64 * 8]
        prompts = [
            {"input_ids": part[None], "attention_mask": torch.ones(1, 64, dtype=torch.long)} for part in ids.split(64)
        ]
    for name, directory in made(args):
        model: Any = load(directory, dtype=getattr(torch, args.dtype))
        how = {"max_new_tokens": 50, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        same: Counter[str] = Counter()
        for number, prompt in enumerate(prompts):
            given = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in prompt.items()}
            found = {
                cache: model.generate(**given, past_key_values=make(model), **how) for cache, make in CACHES.items()
            }
            expected = found["ordinary"]
            for cache, other in found.items():
                pairs = zip(expected.sequences[0].tolist(), other.sequences[0].tolist(), strict=False)
                at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
                same[cache] += at is None
                if at is not None:
                    step = at - given["input_ids"].shape[1]
                    two = [expected.sequences[0, at], other.sequences[0, at]]
                    by = [" and ".join(f"{float(x.logits[step][0, i]):.6g}" for i in two) for x in (expected, other)]
                    print(f"{name} | prompt {number}, step {step}: {by[0]} by the ordinary cache, {by[1]} by {cache}")
        print(f"{name}, {args.dtype}: of {len(prompts)} prompts as many have the same tokens: {dict(same)}", flush=True)


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
def products(model: Any, tokens: int, repeats: int) -> float:
    """Milliseconds of the products alone that rebuild the keys of all layers from latents, in tiles and float32."""
    best = float("inf")
    latents = [[torch.zeros(tokens, rank) for rank in site.ranks[0]] for site in sites(model)]
    ups = [[torch.zeros(rank, site.module.head_dim) for rank in site.ranks[0]] for site in sites(model)]
    for _ in range(repeats):
        started = time.process_time()
        for parts, heads in zip(latents, ups, strict=True):
            for z, up in zip(parts, heads, strict=True):
                for part in z.split(1024):
                    _ = part @ up
        best = min(best, 1e3 * (time.process_time() - started))
    return best


@torch.inference_mode()
def timing(args: argparse.Namespace) -> None:
    """Print the table of steps."""
    dtype = getattr(torch, args.dtype)
    print(
        f"{args.dtype}, batch {args.batch}, {torch.get_num_threads()} threads; ms a step, and × the ordinary cache's\n"
    )
    head = ["rank", "tokens", *(cell for name in CACHES for cell in (name, "MB")), "products"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for rank in (int(part) for part in args.ranks.split(",")):
        model = random_llama(rank, dtype)
        for tokens in (int(part) for part in args.tokens.split(",")):
            found = {name: each for name, (each,) in steps(model, CACHES, [tokens], args).items()}
            whole = found["ordinary"][0]
            cells = [f"{ms:.1f} (× {ms / whole:.2f}) | {held / 1e6:.1f}" for ms, held in found.values()]
            cells.append(f"{products(model, tokens, args.repeats):.1f}")
            print(f"| {rank} | {tokens} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("quality", "tokens", "time"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="builtin", help="calibration text")
    parser.add_argument("--heldout", default="builtin", help="text for perplexity")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--made", default="laser:0.4,laser:0.3", help="recipes and the shares of bytes that they keep")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--contexts", default="")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ranks", default="32,48,64")
    parser.add_argument("--tokens", default="512,2048,8192")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if args.only in (None, "quality"):
        quality(args)
    if args.only == "tokens":
        greedy(args)
    if args.only in (None, "time"):
        timing(args)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {versions}, seed 0")


if __name__ == "__main__":
    main()
