"""Configurations of mergekit: the six of its examples, and thirteen from public model cards, as far as they matter.

What each becomes: the warnings and notes that are expected, by words of each, or the words of a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class File:
    """layers: of its models. warnings, notes: words of each that has to be there, and no others. refused: words, and
    the line. merge: the expression, if it is written out. stacks: their layers. document: which of several."""

    text: str
    layers: int = 32
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    refused: tuple[str, int] | None = None
    merge: str = ""
    stacks: dict[str, str] = field(default_factory=dict)
    document: str | None = None


DTYPE, LOTS, TIE, TOKENIZER, FLOOR = "rounds once", "other lots", "tie at the threshold", "tokenizer's files", "floor"
ROUNDED, FILTERED = "compute this method in float32", "a gradient with a filter goes over the layers"
SIX = ["0-7", "4-11", "8-15", "12-19", "16-23", "20-31"]
FILES = {
    "linear": File(
        """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {weight: 1.0}
  - model: WizardLM/WizardLM-13B-V1.2
    parameters: {weight: 0.3}
  - model: garage-bAInd/Platypus2-13B
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
""",
        notes=(ROUNDED,),
        merge="(orca_mini + 0.3 * WizardLM + 0.5 * Platypus2) / 1.8",
    ),
    "ties": File(
        """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
        layers=40,
        warnings=(DTYPE, TIE),
        merge="Llama_2 + elect(trim(orca_mini - Llama_2, density=density_orca_mini), "
        "trim(Platypus2 - Llama_2, density=0.5), trim(WizardMath - Llama_2, density=0.33), "
        "weights=[1, weight_Platypus2, weight_WizardMath])",
    ),
    "bio-merge": File(
        """\
models:
  - model: mistralai/Mistral-7B-Instruct-v0.2
    parameters: {density: 0.5, weight: 0.5}
  - model: BioMistral/BioMistral-7B
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
        warnings=(DTYPE, TIE),
        merge="Mistral + ties(Mistral_Instruct - Mistral, BioMistral - Mistral, density=0.5, "
        "weights=0.5, normalize=no)",
    ),
    "gradient-slerp": File(
        """\
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
        layers=40,
        notes=(ROUNDED, FILTERED),
        merge="slerp(orca_mini, Platypus2, t=t)",
    ),
    "arcee_fusion": File(
        "models:\n  - model: arcee-ai/Virtuoso-Small-v2\nmerge_method: arcee_fusion\n"
        "base_model: sometimesanotion/Qwenvergence-14B\ndtype: float16\n",
        refused=("arcee_fusion is not offered: on updates of RL's size its float32 scores are noise", 3),
    ),
    "orcamini-platy-44layer": File(
        """\
slices:
  - sources:
    - model: psmathur/orca_mini_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: garage-bAInd/Platypus2-13B
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""",
        layers=40,
        warnings=("final norm and head are those of `Platypus2`",),
        merge="stacked",
        stacks={"stacked": "orca_mini 0-23, Platypus2 20-39"},
    ),
    "FuseAI/FuseO1-DeepSeekR1-QwQ-SkyT1-32B-Preview": File(
        """\
models:
  # Pivot model
  - model: Qwen/Qwen2.5-32B
  # Target models
  - model: deepseek-ai/DeepSeek-R1-Distill-Qwen-32B
  - model: Qwen/QwQ-32B-Preview
  - model: NovaSky-AI/Sky-T1-32B-Preview
merge_method: sce
base_model: Qwen/Qwen2.5-32B
parameters:
  select_topk: 1.0
dtype: bfloat16
""",
        layers=64,
        warnings=(DTYPE,),
        notes=(FLOOR,),
        merge="Qwen2_5 + sce(DeepSeek_R1_Distill_Qwen - Qwen2_5, QwQ_Preview - Qwen2_5, Sky_T1_Preview - Qwen2_5, "
        "floor=1e-6)",
    ),
    "YOYO-AI/Qwen2.5-14B-Fusion": File(
        """\
models:
  - model: YOYO-AI/Qwen2.5-14B-it-restore
merge_method: arcee_fusion
base_model: YOYO-AI/Qwen2.5-Coder-14B-YOYO
parameters:
  normalize: true
  int8_mask: true
  rescale: true
dtype: float16
tokenizer_source: base
""",
        refused=("arcee_fusion is not offered", 3),
    ),
    "YOYO-AI/Qwen2.5-7B-YOYO-super": File(
        """\
models:
  - model: Qwen/Qwen2.5-7B-instruct
    parameters:
      density: 1
      weight: 1
      lambda: 0.9
merge_method: della
base_model: Qwen/Qwen2.5-7B
parameters:
  density: 1
  weight: 1
  lambda: 0.9
  normalize: true
  int8_mask: true
dtype: bfloat16
tokenizer_source: base
name: Qwen2.5-7B-YOYO-1
---
models:
  - model: Qwen/Qwen2.5-7B-Coder
    parameters: {density: 1, weight: 1, lambda: 0.9}
merge_method: della
base_model: Qwen2.5-7B-YOYO-1
parameters: {density: 1, weight: 1, lambda: 0.9, normalize: true, int8_mask: true}
dtype: bfloat16
name: Qwen2.5-7B-YOYO-2
""",
        layers=28,
        warnings=(DTYPE,),
        notes=("`lambda` 0.9 under `models` does nothing in mergekit", TOKENIZER),
        merge="Qwen2_5 + 0.9 * elect(Qwen2_5_instruct - Qwen2_5)",
        document="Qwen2.5-7B-YOYO-1",
    ),
    "MohammadOthman/Mistral-NeuralHermes-Merge-7B-slerp": File(
        """\
slices:
  - sources:
      - model: teknium/OpenHermes-2.5-Mistral-7B
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: teknium/OpenHermes-2.5-Mistral-7B
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
        notes=(ROUNDED, FILTERED),
        merge="slerp(OpenHermes_2_5_Mistral, NeuralHermes_2_5_Mistral, t=t)",
    ),
    "testmoto/gemma-2-llm2024-01": File(
        """\
models:
  - model: google/gemma-2-9b
  - model: google/gemma-2-9b-it
    parameters: {density: 0.53, weight: 0.4}
  - model: UCLA-AGI/Gemma-2-9B-It-SPPO-Iter3
    parameters: {density: 0.53, weight: 0.3}
  - model: princeton-nlp/gemma-2-9b-it-SimPO
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: google/gemma-2-9b
parameters: {int8_mask: true}
dtype: bfloat16
""",
        layers=42,
        warnings=(DTYPE, LOTS),
        merge="gemma_2 + elect(drop(gemma_2_it - gemma_2, density=0.53, rescale=l1), "
        "drop(Gemma_2_It_SPPO_Iter3 - gemma_2, density=0.53, rescale=l1), "
        "drop(gemma_2_it_SimPO - gemma_2, density=0.53, rescale=l1), weights=[0.4, 0.3, 0.3], normalize=no)",
    ),
    "adriansterr/fine-tuning-for-absa": File(
        """\
models:
  - model: ./base
  - model: ./restaurant
    parameters: {density: 1.0, weight: 1.0}
  - model: ./laptop
    parameters: {density: 1.0, weight: 0.846}
merge_method: dare_ties
base_model: ./base
parameters: {rescale: false}
dtype: bfloat16
""",
        warnings=(DTYPE,),
        merge="base + elect(restaurant - base, laptop - base, weights=[1, 0.846], normalize=no)",
    ),
    "Edens-Gate/Holland-Magnum-Merge-R2": File(
        """\
slices:
  - sources:
      - model: NewEden/Holland-8B
        layer_range: [0, 32]
        parameters: {weight: 0.5}
      - model: anthracite-org/magnum-v3-8b
        layer_range: [0, 32]
        parameters: {weight: 0.5}
      - model: NewEden/Base-8B
        layer_range: [0, 32]
merge_method: task_arithmetic
base_model: NewEden/Base-8B
dtype: bfloat16
""",
        warnings=(DTYPE,),
        merge="Base + 0.5 * (Holland - Base) + 0.5 * (magnum - Base)",
    ),
    "TareksGraveyard/Ethos-Alpha-LLaMa-70B": File(
        """\
models:
  - model: TareksLab/a-70B
  - model: TareksLab/b-70B
  - model: TareksLab/c-70B
  - model: TareksLab/d-70B
  - model: TareksLab/e-70B
merge_method: della_linear
base_model: TareksLab/base-70B
parameters:
  weight: 0.2
  density: 0.7
  epsilon: 0.2
  lambda: 1.1
dtype: bfloat16
tokenizer_source: TareksLab/c-70B
""",
        layers=80,
        warnings=(DTYPE, LOTS),
        notes=(TOKENIZER,),
    ),
    "ProdeusUnity/Stellar-Odyssey-12b-v0.0": File(
        """\
merge_method: della_linear
models:
  - model: C:\\Users\\pu\\models\\NemoMix-12B
    parameters: {weight: 0.3, density: 0.25}
  - model: C:\\Users\\pu\\models\\Rocinante-12B
    parameters: {weight: 0.1, density: 0.4}
  - model: C:\\Users\\pu\\models\\magnum-12b
    parameters: {weight: 0.4, density: 0.5}
merge_method: della_linear
base_model: C:\\Users\\pu\\models\\Mistral-Nemo-12B
parameters: {epsilon: 0.05, lambda: 1}
dtype: bfloat16
""",
        layers=40,
        warnings=(DTYPE, LOTS),
        notes=("`merge_method` is written twice", *["is a folder on Windows"] * 4),
    ),
    "Bondds/07viz-07": File(
        """\
models:
  - model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: WizardLM/WizardMath-7B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters: {normalize: true}
dtype: float16
""",
        warnings=(DTYPE, TIE),
    ),
    "spacematt/Gemma-Moon-2-9B-it": File(
        """\
models:
  - model: google/gemma-2-9b-it
  - model: org/Moon-9B
    parameters: {density: 0.5, weight: 0.5}
merge_method: dare_ties
base_model: google/gemma-2-9b-it
parameters: {int8_mask: true}
dtype: bfloat16
chat_template: auto
tokenizer: {source: base}
""",
        layers=42,
        warnings=(DTYPE, LOTS),
        notes=("chat template", TOKENIZER),
        merge="gemma_2_it + elect(drop(Moon - gemma_2_it, density=0.5, rescale=l1), weights=0.5, normalize=no)",
    ),
    "Tech-Meld/HX-Mistral-1.5B_v0.2": File(
        """\
slices:
  - sources:
      - {model: mistralai/Mistral-7B-v0.2, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: mistralai/Mistral-7B-v0.2, layer_range: [8, 10], parameters: {weight: 1}}
      - {model: mistralai/Mistral-7B-v0.2, layer_range: [16, 18], parameters: {weight: 1}}
      - {model: mistralai/Mistral-7B-v0.2, layer_range: [30, 32], parameters: {weight: 1}}
merge_method: linear
dtype: bfloat16
""",
        refused=("is listed twice, which mergekit refuses too", 4),
    ),
    "elinas/Llama-3-13B-Instruct": File(
        """\
slices:
  - sources: [{model: meta-llama/Meta-Llama-3-8B-Instruct, layer_range: [0, 8]}]
  - sources: [{model: meta-llama/Meta-Llama-3-8B-Instruct, layer_range: [4, 12]}]
  - sources: [{model: meta-llama/Meta-Llama-3-8B-Instruct, layer_range: [8, 16]}]
  - sources: [{model: meta-llama/Meta-Llama-3-8B-Instruct, layer_range: [12, 20]}]
  - sources: [{model: meta-llama/Meta-Llama-3-8B-Instruct, layer_range: [16, 24]}]
  - sources: [{model: meta-llama/Meta-Llama-3-8B-Instruct, layer_range: [20, 32]}]
merge_method: passthrough
dtype: bfloat16
""",
        merge="stacked",
        stacks={"stacked": ", ".join(f"Meta_Llama_3_Instruct {layers}" for layers in SIX)},
    ),
}
