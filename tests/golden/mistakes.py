"""Typical mistakes, each a command that ends with an error: recipes that are wrong, models that do not fit, options."""

from __future__ import annotations

from playing import Step, command

FAMILY = "models: {target: ./target, rl: ./rl, sft: ./sft}"
GOOD = f"""\
skillmerge: 1
{FAMILY}
coefficients: {{lam: 0.7}}
merge: target + lam * (rl - sft)
output: {{path: ./merged}}
"""
DUBIOUS = """\
skillmerge: 1
models:
  target: ./target
  rl: hf://acme/rl@main
  sft: ./target
  spare: ./spare
coefficients:
  lam:
    rules:
      - {layers: 0-3, value: 0.5}
      - {layers: 0-3, value: 12}
  unused: 1.0
merge: target + lam * (rl - sft)
"""
WRONG = """\
skillmerge: 1
models: {target: ./target, rl: ./rl}
coefficients: {lam: one}
merge: target + lam * rl - sft
output: {path: ./merged, dtype: int8}
gates: {chnged: {min: 1}}
"""

MODELS = {
    "other": "qwen2/target",
    "longer": "llama/target+8",
    "buffers": "mixed/target",
    "buffers2": "mixed/rl",
}

RECIPES: dict[str, tuple[str, str]] = {
    "unknown-key": ("output:", "outptu:"),
    "version": ("skillmerge: 1", "skillmerge: 2"),
    "no-models": (FAMILY + "\n", ""),
    "unknown-name": ("lam * (rl", "lambda * (rll"),
    "syntax": ("(rl - sft)", "(rl - sft"),
    "product": ("lam * (rl - sft)", "rl * sft"),
    "not-one": ("target + lam", "2 * target + lam"),
    "zero": ("(rl - sft)", "(rl - sft) / 0"),
    "missing-folder": ("./rl,", "./rll,"),
    "file-for-folder": ("./rl,", "./good.yaml,"),
    "missing-tensors": ("./rl,", "./other,"),
    "shape": ("./rl,", "./longer,"),
    "bad-rule": ("{lam: 0.7}", "{lam: {rules: [{layers: 9-, value: 1}]}}"),
    "bad-glob": ("{lam: 0.7}", '{lam: {rules: [{tensors: "*.q_prj.*", value: 1}]}}'),
    "bad-kind": ("{lam: 0.7}", "{lam: {rules: [{modules: attentoin, value: 1}]}}"),
    "bad-value": ("{lam: 0.7}", "{lam: {rules: [{layers: 0, valeu: 1}]}}"),
    "bad-ramp": ("{lam: 0.7}", "{lam: {rules: [{layers: 0-2, ramp: [1]}]}}"),
    "bad-copy": ("output:", "copy: [{tensors: nothing.*, from: rl}]\noutput:"),
    "bad-dtype": ("./merged}", "./merged, dtype: float8}"),
    "bad-size": ("./merged}", "./merged, shard_size: many}"),
    "bad-like": ("./merged}", "./merged, like: nobody}"),
    "bad-gate": ("output:", "gates: {changd: {min: 0.1}}\noutput:"),
    "bad-uri": ("./rl,", "ftp://bucket/rl,"),
    "skill-degree": ("./merged}", "./merged, kind: skill}"),
    "not-a-skill": ("rl: ./rl", "rl: {skill: ./rl}"),
    "zstd-model": ("./merged}", "./merged, compression: zstd}"),
    "yaml": ("coefficients: {", "coefficients: {{"),
    "twice": ("merge:", "merge: target\nmerge:"),
    "greater": ("./merged}", "./target}"),
}
"""Name -> what of the good recipe is replaced, and by what."""

FILES = {f"{name}.yaml": GOOD.replace(*change) for name, change in RECIPES.items()} | {
    "good.yaml": GOOD,
    "empty.yaml": "",
    "list.yaml": "- 1\n- 2\n",
    "buffers.yaml": GOOD.replace("./target", "./buffers").replace("./rl", "./buffers2").replace("./sft", "./buffers"),
    "notes.txt": "mine\n",
    "full/notes.txt": "mine\n",
    "broken/config.json": "{",
    "broken/model.safetensors": "no weights",
    "hollow/config.json": "{}",
}

_LINES = (
    "plan nowhere.yaml",
    "plan empty.yaml",
    "plan list.yaml",
    "plan notes.txt",
    "apply good.yaml --set lam",
    "apply good.yaml --set lan=0.5",
    "apply good.yaml --set lam=much",
    "apply good.yaml --device tpu",
    "apply good.yaml --threads 0",
    "apply good.yaml --stats some",
    "apply good.yaml --memory-limit 100MB --threads 2",
    "apply good.yaml --memory-limit lots",
    "apply good.yaml --force",
    "apply good.yaml --no-local",
    "apply good.yaml -o full",
    "apply good.yaml -o full --overwrite",
    "apply good.yaml -o notes.txt",
    "apply good.yaml --threads 2 --device cpu -o target/inside",
    "apply good.yaml -o .",
    "apply good.yaml --report notes.txt",
    "apply good.yaml --events nowhere/events.jsonl",
    "apply good.yaml --report one --junit one",
    "apply",
    "aply good.yaml",
    "verify nowhere",
    "verify target",
    "gate target",
    "rebuild target",
    "rebuild target --check",
    "rebuild target --check --sample 200%",
    "sign target",
    "attest target",
    "push target acme/model",
    "extract --from rl --minus nowhere -o skill",
    "extract --from rl --minus other -o skill",
    "extract --from rl --minus sft",
    "extract --from rl --minus sft -o skill --keep 2",
    "extract --from broken --minus sft -o skill",
    "extract --from hollow --minus sft -o skill",
    "export target -o adapter --lora-rank 4",
    "export target -o adapter",
    "inspect target",
    "inspect target nowhere",
    "inspect target other",
    "derive good.yaml --choice best --base base -o new.yaml",
    "derive good.yaml --choice match --base nowhere -o new.yaml",
    "sweep good.yaml --set lam=0:1 --score true",
    "sweep good.yaml --set lam=0:1:0.5 --score nothing:here",
    "sweep good.yaml --set lam=1:0:0.5 --score true",
    "sweep good.yaml --score true",
    "lint",
    "lint nowhere.yaml",
    "demo full",
    "init good.yaml",
    "plan good.yaml --diff notes.txt",
    "plan good.yaml --lock --locked",
    "apply good.yaml --nothing --json",
    "verify target --json",
    "apply good.yaml --threads 2 --device cpu -q",
    "apply good.yaml --threads 2 --device cpu --set lam=0.1",
    "apply good.yaml --threads 2 --device cpu -o merged/inside",
)

IN_RECIPES: tuple[Step, ...] = (
    *(command(f"plan {name}.yaml --threads 2") for name in RECIPES),
    command("plan shape.yaml --threads 2", columns=80),
    command("plan missing-tensors.yaml --threads 2", columns=80),
    command("plan unknown-key.yaml --json"),
    command("plan shape.yaml --json"),
    command("apply missing-folder.yaml --json"),
    command("apply missing-tensors.yaml --log-format json"),
    command("apply unknown-key.yaml --threads 2 --device cpu"),
    command("apply shape.yaml --threads 2 --device cpu"),
    command("plan buffers.yaml --threads 2"),
    command("apply buffers.yaml --threads 2 --device cpu -o buffers-merged"),
)
IN_OPTIONS: tuple[Step, ...] = tuple(map(command, _LINES))
