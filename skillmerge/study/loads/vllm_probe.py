"""Load a model folder with vLLM and let it continue a prompt; `child` gives it a process of its own.

What vLLM refuses is in the report in its own words. Compares nothing: that is `generation`.
"""

from __future__ import annotations

from typing import Any

from skillmerge.study.loads.child import told

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its errors reach us, and nothing is left running
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; it would take a share of all memory
}


def main(folder: str, prompt: list[int], dtype: str, tokens: int, likely: int, has_tokenizer: bool) -> dict[str, Any]:
    """Return the report of one load: `tokens` and `steps`, as `load_probe` has them, or what is wrong.

    prompt: ids. likely: how many of the likeliest tokens are told of each step.
    """
    try:
        import vllm
    except Exception as error:  # an installation that is broken says nothing about the model
        return {"ok": False, "machine": f"the installed vLLM cannot be imported: {type(error).__name__}: {error}"}
    try:
        engine = vllm.LLM(
            model=folder, dtype=dtype, seed=0, enforce_eager=True, trust_remote_code=False,
            max_model_len=len(prompt) + tokens, max_num_seqs=1, max_logprobs=likely,
            skip_tokenizer_init=not has_tokenizer,
        )  # fmt: skip
        settings = vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=likely, detokenize=False
        )
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
        made = answer.outputs[0]
        steps = [{"likely": [(token, found.logprob) for token, found in row.items()]} for row in made.logprobs]
        return {"ok": True, "version": vllm.__version__, "tokens": list(made.token_ids), "steps": steps}
    except Exception as error:
        return told(error)
