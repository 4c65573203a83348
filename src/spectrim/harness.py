"""Any program that opens models with transformers, with spectrim's checkpoint format known to it.

``python -m spectrim.harness MODULE ARGUMENTS…`` does what ``python -m MODULE ARGUMENTS…`` does, after
``import spectrim``::

    python -m spectrim.harness lm_eval --model hf --model_args pretrained=CHECKPOINT --tasks piqa
    accelerate launch -m spectrim.harness lmms_eval --model qwen2_5_vl --model_args pretrained=CHECKPOINT --tasks mme
"""

import runpy
import sys
from importlib.util import find_spec

import spectrim  # noqa: F401  registers the format


def main() -> None:
    """Run the module that the first argument names as the main program; exit code 2 without one, or for none."""
    if len(sys.argv) < 2:
        print("spectrim.harness: name a module to run, such as lm_eval", file=sys.stderr)
        raise SystemExit(2)
    module = sys.argv[1]
    if find_spec(module) is None:
        print(f"spectrim.harness: there is no module '{module}'; install it, or correct its name", file=sys.stderr)
        raise SystemExit(2)
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
