"""A mixture of experts from the built-in model, for trials of compression: not shipped, one command.

    python tools/upcycle_demo.py --out DIR [--experts 8 --active 2 --minutes 25]

A LLaVA with a Mixtral backbone. Each expert starts as a copy of the dense MLP in which a share of the inner neurons,
others in each expert, is drawn anew (drop-upcycling, Nakamura et al., ICLR 2025); then the backbone is trained on the
tasks and the training text of the built-in model, on one core and by the clock. Needs nothing but this repository.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_demo
from spectrim import load_processor
from spectrim.demo import resolve
from spectrim.demo.text import split_text


def upcycled(experts: int, active: int, fresh: float) -> Any:
    """The built-in model in float32, its MLPs copied into experts of which a share `fresh` of the neurons is new."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MixtralConfig

    dense = LlavaForConditionalGeneration.from_pretrained(resolve("demo"), dtype=torch.float32)
    text = dense.config.text_config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    names += ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "hidden_act")
    mixture = MixtralConfig(
        **{name: text[name] for name in names}, num_local_experts=experts, num_experts_per_tok=active
    )
    config = LlavaConfig(**{**dense.config.to_dict(), "text_config": mixture.to_dict()})
    model = LlavaForConditionalGeneration(config)
    state = dense.state_dict()
    missing, unexpected = model.load_state_dict(state, strict=False)
    for layer, old in zip(model.model.language_model.layers, dense.model.language_model.layers, strict=True):
        gate, up, down = (getattr(old.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        stack = layer.mlp.experts
        with torch.no_grad():
            for number in range(experts):
                new = torch.rand(len(gate)) < fresh
                one = [torch.where(new[:, None], torch.randn_like(W) * W.std(), W) for W in (gate, up)]
                stack.gate_up_proj[number] = torch.cat(one)
                stack.down_proj[number] = torch.where(new, torch.randn_like(down) * down.std(), down)
            layer.mlp.gate.weight.normal_(std=0.05)
    assert all(".mlp." in name for name in (*missing, *unexpected)), (missing, unexpected)
    return model


def imbalance(logits: list[torch.Tensor], active: int) -> torch.Tensor:
    """Load-balancing loss of the Switch Transformer: 1 where all experts get the same share, mean over layers."""
    losses = []
    for each in logits:
        shares = each.float().softmax(-1)  # [tokens, experts]
        hits = torch.nn.functional.one_hot(shares.topk(active).indices, each.shape[-1]).float().sum(1).mean(0)
        losses.append((hits / active * shares.mean(0)).sum() * each.shape[-1])
    return torch.stack(losses).mean()


def train(args: argparse.Namespace) -> None:
    """Train by the clock, and write the model directory."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    work = args.out.with_name(args.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    (work / "tokenizer.json").write_bytes((Path(resolve("demo")) / "tokenizer.json").read_bytes())
    (work / "easy_questions.json").write_text("[]")
    np.savez(work / "easy_images.npz", pixels=np.zeros((0, 1, 1, 3), dtype=np.uint8))
    questions = train_demo.Questions(work, rng, args.seed)
    questions.early = False
    text = f"{split_text('train')}\n\n{train_demo.clean(train_demo.docstrings())}"
    corpus = torch.tensor(questions.tokenizer.encode(text).ids)
    model = upcycled(args.experts, args.active, args.fresh)
    model.set_experts_implementation("eager")
    model.model.vision_tower.requires_grad_(False)
    routed: list[torch.Tensor] = []
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda *call: routed.append(call[-1][0]))
    optimizer, began, step, spent = train_demo.optimiser([model.model.language_model]), time.time(), 0, 0.0
    with (work / "train.jsonl").open("w") as log:
        while (spent := time.time() - began) < args.minutes * 60:
            falling = 0.02 + 0.49 * (1 + math.cos(math.pi * spent / 60 / args.minutes))
            rate = args.rate * min(1.0, (step + 1) / 30) * falling
            for group in optimizer.param_groups:
                group["lr"] = rate
            starts = torch.from_numpy(rng.integers(len(corpus) - train_demo.TEXT_LENGTH - 1, size=args.text_batch))
            windows = corpus[starts[:, None] + torch.arange(train_demo.TEXT_LENGTH + 1)]
            routed.clear()
            with torch.autocast("cpu", torch.bfloat16):
                answers, language = train_demo.losses(model, questions.batch(args.batch), windows)
            balance = imbalance(routed, args.active)
            (answers + args.text_weight * language + args.balance * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 10 == 0:
                found = {"answers": answers.item(), "text": language.item(), "balance": balance.item()}
                line = json.dumps({"step": step, "seconds": round(spent), **{k: round(v, 4) for k, v in found.items()}})
                log.write(line + "\n")
                print(line, flush=True)
            if step % 100 == 0:
                write(model, args.out)
    write(model, args.out)


def write(model: Any, out: Path) -> None:
    """The model directory, in bfloat16, with the processor of the built-in model."""
    from copy import deepcopy

    routers = [layer.mlp.gate for layer in model.model.language_model.layers]
    hooks = [dict(router._forward_hooks) for router in routers]
    for router in routers:
        router._forward_hooks.clear()
    deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    for router, kept in zip(routers, hooks, strict=True):
        router._forward_hooks.update(kept)
    load_processor(resolve("demo")).save_pretrained(out)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model directory")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--fresh", type=float, default=0.25, help="share of an expert's neurons that are drawn anew")
    parser.add_argument("--batch", type=int, default=32, help="questions in a step")
    parser.add_argument("--text-batch", type=int, default=2, help="text windows of 256 tokens in a step")
    parser.add_argument("--text-weight", type=float, default=0.4)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
