"""Greedy tokens from vLLM, in a process of its own: ``python vllm_generate.py JOBS.json RESULTS.json``.

A job is ``{"directory", "parallel", "dtype", "eager", "tokens", "prompt" or "prompt_token_ids",
"image"}``; the results are, in the same order, lists of token ids, or the traceback of what went wrong as a string.
With ``"weights": true``, the bytes follow in which the engine holds the weights that are factored or integers.
"""

import json
import os
import sys
import traceback
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image


def generate(job: dict[str, Any]) -> list[int]:
    from vllm import LLM, SamplingParams

    image = job.get("image")
    llm = LLM(
        job["directory"],
        dtype=job.get("dtype", "float32"),
        enforce_eager=job.get("eager", True),
        max_model_len=256,
        max_num_seqs=2,
        tensor_parallel_size=job.get("parallel", 1),
        distributed_executor_backend="mp" if job.get("parallel", 1) > 1 else None,
        skip_tokenizer_init=image is None,
        seed=0,
    )
    if image is None:
        prompt: dict[str, Any] = {"prompt_token_ids": job["prompt_token_ids"]}
    else:
        prompt = {"prompt": job["prompt"], "multi_modal_data": {"image": Image.open(image).convert("RGB")}}
    how = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=image is not None)
    (output,) = llm.generate(prompt, how, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    return [*tokens, *llm.collective_rpc(held)] if job.get("weights") else tokens


def held(worker: Any) -> int:
    """Bytes of the linears that the plugin runs, each storage once; biases are not counted."""
    from spectrim.serve.linears import FactoredLinearMethod

    modules = worker.get_model().modules()
    linears = [x for x in modules if isinstance(getattr(x, "quant_method", None), FactoredLinearMethod)]
    matrices = [matrix for linear in linears for matrix in (*linear.first, *linear.second)]
    storages = [t.untyped_storage() for matrix in matrices for t in chain(matrix.parameters(), matrix.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    source, target = map(Path, sys.argv[1:])
    results: list[Any] = []
    for job in json.loads(source.read_text()):
        try:
            results.append(generate(job))
        except Exception:
            results.append(traceback.format_exc())
        target.write_text(json.dumps(results))


if __name__ == "__main__":  # worker processes of vLLM import this file again
    main()
