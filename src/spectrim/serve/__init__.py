"""Serving compressed checkpoints with vLLM: a plugin that vLLM finds by its entry point; nothing here imports vLLM."""


def register() -> None:
    """Tell vLLM how to load and run checkpoints of spectrim; vLLM calls this in every one of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from spectrim.checkpoint.config import METHOD
    from spectrim.serve.plugin import FactoredConfig

    register_quantization_config(METHOD)(FactoredConfig)
