"""What is recorded: recipes over the tiny families, and the commands that are run on them.

Commands that compute take `--threads 2 --device cpu` where they accept it; where the order of events shows, one thread.
"""

from __future__ import annotations

import mistakes
from playing import Scenario, Step, command
from texts import (
    AVERAGE,
    BLEND,
    CHAT,
    COPY,
    GATES,
    KEEP,
    PAST,
    PATCHED,
    RAMP,
    REMOVAL,
    SCORE,
    STOCHASTIC,
    SWEPT,
    TWO,
    WIDE,
    WITH_SKILL,
    ZSTD,
)

COMMANDS = "apply plan verify gate rebuild sign attest extract export inspect sweep push lint doctor init schema demo"

SMALL_SHARDS = PAST.replace("path: ./merged", "path: ./merged\n  shard_size: 4KB")
QUARTET = ("base", "target", "rl", "sft")


def family(name: str, *more: str) -> dict[str, str]:
    """Folders with the models of a family, named after their roles."""
    return {role: f"{name}/{role}" for role in (*QUARTET, *more)}


def both(line: str) -> tuple[Step, Step]:
    """The same command in a wide and in a narrow terminal; WIDTH keeps their outputs apart."""
    return command(line.replace("WIDTH", "wide")), command(line.replace("WIDTH", "narrow"), columns=80)


RUN = "--threads 2 --device cpu"

_past = Scenario(
    (
        *both("lint recipe.yaml"),
        *both("plan recipe.yaml --threads 2"),
        command("plan recipe.yaml --threads 2 --json"),
        command("plan recipe.yaml --threads 2 -o plan.json --markdown plan.md --report plan.html"),
        command("plan recipe.yaml --threads 2 --detailed-exitcode -o plan.json"),
        command("apply recipe.yaml --threads 1 --device cpu --events events.jsonl --report apply.html "
                "--result-file result.json --junit apply.xml"),
        command(f"apply recipe.yaml {RUN}"),
        command(f"apply recipe.yaml {RUN} --full --json"),
        command("plan recipe.yaml --threads 2 --detailed-exitcode"),
        command("plan recipe.yaml --threads 2 --diff plan.json --set lam=0.2 --markdown changes.md"),
        *both(f"apply recipe.yaml {RUN} -v -o out-WIDTH --stats full"),
        command(f"apply recipe.yaml {RUN} -o out-json --json --set lam=0.3 --hash-inputs"),
        command(f"apply recipe.yaml {RUN} -o out-off --stats off -q"),
        command(f"apply recipe.yaml {RUN} -o out-wide --set lam=0"),
        command(f"apply recipe.yaml {RUN} -o out-wide --set lam=0 --overwrite"),
        command(f"apply plan.json {RUN} -o out-plan"),
        *both("verify merged"),
        command("verify merged --json --junit verify.xml"),
        command("--help"),
    ),
    family("llama"),
    {"recipe.yaml": PAST},
)  # fmt: skip
_proof = Scenario(
    (
        command(f"apply recipe.yaml {RUN} -q"),
        *both("rebuild merged --check --threads 2 --device cpu"),
        command("rebuild merged --check --sample 30% --seed 4 --threads 2 --device cpu --json"),
        command("rebuild merged -o rebuilt --threads 2 --device cpu"),
        command("gate merged --gates gates.yaml --json --junit gate.xml --events gate.jsonl"),
        *both("gate merged --gates gates.yaml"),
        command("gate merged"),
        command("attest merged --json"),
        command("verify merged", before=(("flip", "merged/model-00002-of-00003.safetensors", ""),)),
        command("verify merged --json --junit damaged.xml"),
        command("rebuild merged --check --threads 2 --device cpu"),
        command(f"apply recipe.yaml {RUN} --full"),
        command(f"apply recipe.yaml {RUN} --full --overwrite --json"),
        command("verify merged", before=(("replace", "merged/skillmerge.manifest.json", "0.7=>0.8"),)),
        command(f"apply gated.yaml {RUN} -o refused", columns=80),
        command(f"apply gated.yaml {RUN} -o refused --keep-failed --json --junit refused.xml --report refused.html"),
    ),
    family("llama"),
    {"recipe.yaml": PAST, "gates.yaml": "gates: {changed: {min: 0.1}, norm_ratio: {max: 0.2}, finite: true}\n",
     "gated.yaml": PAST + "gates: {changed: {min: 0.99}, vanished: {max: 0.001}, finite: true}\n"},
)  # fmt: skip
_studies = Scenario(
    (
        *both("inspect sft rl --threads 2"),
        *both("inspect recipe.yaml --base base --threads 2"),
        command("inspect sft rl --threads 2 --json --stats full", digits=9),
        command("inspect recipe.yaml --base base --threads 2 --json --report inspect.html", digits=9),
        command("inspect sft rl --threads 2 --spectral 4 --json --report spectra.html", digits=5),
        command("inspect recipe.yaml --threads 2 --set lam=2 --stats off -q"),
    ),
    family("llama"),
    {"recipe.yaml": PAST},
)
_skill = Scenario(
    (
        *both("extract --from rl --minus sft -o skill-WIDTH --threads 2"),
        command("extract --from rl --minus sft -o skill --threads 2 --json --hash-inputs"),
        command("extract --from rl --minus sft -o kept --keep 0.25 --dtype float32 --ignore lm_head* --threads 2 -v"),
        *both("inspect skill --threads 2"),
        command("inspect skill --threads 2 --json", digits=9),
        command("verify skill --parent rl"),
        command("verify skill --parent sft --json"),
        command("verify skill --parent target"),
        command("plan with-skill.yaml --threads 2"),
        command(f"apply with-skill.yaml {RUN} --json"),
        command("rebuild merged --check --threads 2 --device cpu"),
        *both("export skill --onto sft -o patch-WIDTH"),
        command("export skill --onto sft -o patch --json"),
        command("export skill --onto rl -o wrong"),
        command("plan patched.yaml --threads 2"),
        command(f"apply patched.yaml {RUN}"),
        command("extract --from patch --minus sft -o again --threads 2 -q"),
        *(Step(step.argv, step.columns, 4) for step in both("export skill --lora-rank 4 -o adapter-WIDTH")),
        command("export skill --lora-rank 8 --base sft --seed 1 -o adapter --json", digits=4),
    ),
    family("llama"),
    {"with-skill.yaml": WITH_SKILL, "patched.yaml": PATCHED},
)
_blend = Scenario(
    (
        command("extract --from rl --minus sft -o skill --threads 2 -q"),
        command("extract --from rl2 --minus sft -o code --threads 2 --zstd --dtype bfloat16"),
        *both("plan blend.yaml --threads 2"),
        command(f"apply blend.yaml {RUN}"),
        command(f"apply zstd.yaml {RUN} --json"),
        command(f"apply keep.yaml {RUN}"),
        command("verify blend"),
        command("verify packed"),
        command("inspect packed --threads 2", digits=9),
        command(f"apply with-skill.yaml {RUN} --json"),
        command(f"apply with-packed.yaml {RUN} --json"),
    ),
    family("qwen2", "rl2"),
    {"blend.yaml": BLEND, "zstd.yaml": ZSTD, "keep.yaml": KEEP, "with-skill.yaml": WITH_SKILL,
     "with-packed.yaml": WITH_SKILL.replace("./skill", "./packed").replace("./merged", "./merged-packed")},
)  # fmt: skip
_tiles = Scenario(
    (
        command(f"apply recipe.yaml {RUN} --stats full --json"),
        command("apply recipe.yaml --threads 1 --device cpu --memory-limit 320MB -o small --json"),
        command(f"apply stochastic.yaml {RUN} -o stochastic --json"),
        command("extract --from rl --minus sft -o skill --threads 2 --json"),
        command("extract --from rl --minus sft -o kept --keep 0.1 --threads 2 --json"),
        command(f"apply with-skill.yaml {RUN} -o same -q"),
        command("export skill --onto sft -o patch --json"),
    ),
    family("tiles"),
    {"recipe.yaml": PAST, "stochastic.yaml": STOCHASTIC, "with-skill.yaml": WITH_SKILL},
)
_sweep = Scenario(
    (
        *both("sweep recipe.yaml --set λ.default=0:1:0.5 --score 'python3 score.py {}' -o sweep-WIDTH --device cpu"),
        command("sweep recipe.yaml --set λ.rules.0.ramp.1=0.5,1 --set λ.default=0,1 --score 'python3 score.py' "
                "--by mean --minimise --repeats 2 -o grid --device cpu --json --report sweep.html"),
        command("sweep recipe.yaml --set λ.default=0:1:0.5 --score 'python3 score.py {}' -o sweep-wide --device cpu "
                "--json"),
        command("sweep recipe.yaml --set λ.default=0,1 --score 'python3 score.py {}' -o sweep-wide --device cpu"),
        command("sweep recipe.yaml --set λ.nothing=0,1 --score 'python3 score.py {}' -o other --device cpu"),
        command("sweep recipe.yaml --set λ.default=0,1 --score 'exit 3' -o failing --device cpu -q"),
    ),
    family("qwen2"),
    {"recipe.yaml": SWEPT, "score.py": SCORE},
)  # fmt: skip
_gates = Scenario(
    (
        command("plan recipe.yaml --threads 2"),
        command("apply recipe.yaml --threads 1 --device cpu --stats full --events events.jsonl --junit apply.xml "
                "--report apply.html"),
        command("gate merged --gates recipe.yaml --base-folder . --json", digits=9),
        *both("gate merged --gates recipe.yaml"),
    ),
    family("qwen2"),
    {"recipe.yaml": GATES, "score.py": SCORE},
)  # fmt: skip
_start = Scenario(
    (
        command("init -"),
        command("init"),
        command("init"),
        command("schema"),
        command("lint recipe.yaml"),
        *both("lint dubious.yaml wrong.yaml missing.yaml"),
        command("lint dubious.yaml wrong.yaml --json --sarif lint.sarif"),
        command("lint dubious.yaml --strict --allow unused-name --log-format json"),
        command("schema --help"),
    ),
    {},
    {"dubious.yaml": mistakes.DUBIOUS, "wrong.yaml": mistakes.WRONG},
)
_help = Scenario(
    tuple(
        Step((*line, "--help"), columns)
        for line in ((), *((name,) for name in COMMANDS.split()))
        for columns in (120, 80)
    )
)


def small(models: dict[str, str], recipe: str, *lines: str) -> Scenario:
    """A recipe of another family or method: planned, merged, verified, and whatever else is asked."""
    steps = [
        *both("plan recipe.yaml --threads 2"),
        command("plan recipe.yaml --threads 2 --json"),
        *both(f"apply recipe.yaml {RUN} -o out-WIDTH"),
        command(f"apply recipe.yaml {RUN} --stats full --json"),
        command("verify merged --json"),
        *map(command, lines),
    ]
    return Scenario(tuple(steps), models, {"recipe.yaml": recipe})


SCENARIOS: dict[str, Scenario] = {
    "past": _past,
    "proof": _proof,
    "studies": _studies,
    "skill": _skill,
    "blend": _blend,
    "tiles": _tiles,
    "sweep": _sweep,
    "gates": _gates,
    "start": _start,
    "help": _help,
    "mistakes in recipes": Scenario(mistakes.IN_RECIPES, family("llama") | mistakes.MODELS, mistakes.FILES),
    "mistakes in options": Scenario(mistakes.IN_OPTIONS, family("llama") | mistakes.MODELS, mistakes.FILES),
    "ramp": small(family("qwen2"), RAMP, "inspect recipe.yaml --threads 2", "plan recipe.yaml --report plan.html"),
    "two skills": small(family("llama", "rl2"), TWO, "rebuild merged --check --threads 2 --device cpu"),
    "average": small(family("gpt2"), AVERAGE, "inspect sft rl --threads 2"),
    "chat vector": small({"continued": "llama/target+8", "rl": "llama/rl", "base": "llama/base"}, CHAT),
    "removal": small(family("mixtral"), REMOVAL, "inspect recipe.yaml --threads 2"),
    "copy": small(
        {**family("mixed"), "rl": "mixed+head/rl", "sft": "mixed+head/sft"}, COPY,
        "extract --from rl --minus sft -o skill --threads 2",
    ),
    "float32": small(family("t5"), WIDE, "inspect sft rl --threads 2"),
    "stochastic": small(family("vision"), STOCHASTIC, "rebuild merged --check --threads 2 --device cpu"),
    "wide parents": Scenario(
        (*(command(f"apply recipe.yaml {RUN} --set lam={lam} -o out-{lam} --json") for lam in (0.3, 0.7, 1.1)),),
        {**family("tiles"), "rl": "tiles+wide/rl", "sft": "tiles+wide/sft"}, {"recipe.yaml": PAST},
    ),
    "encoder": small(family("bert"), PAST, "inspect sft rl --threads 2"),
    "old output": Scenario(
        (
            command("verify merged"),
            command("verify merged --json"),
            command("rebuild merged --check --threads 2 --device cpu"),
            command(f"apply recipe.yaml {RUN}"),
            command(f"apply recipe.yaml {RUN} --full --json"),
            command("plan recipe.yaml --threads 2 --detailed-exitcode"),
            command("gate merged --gates recipe.yaml --json"),
        ),
        family("qwen2"), {"recipe.yaml": GATES, "score.py": SCORE}, "output",
    ),
    "old skill": Scenario(
        (
            command("verify skill"),
            command("verify skill --parent rl"),
            command(f"apply with-skill.yaml {RUN} --json"),
            command("extract --from rl --minus sft -o new --threads 2 -q"),
            command("inspect packed --threads 2", digits=9),
        ),
        family("qwen2"), {"with-skill.yaml": WITH_SKILL}, "skill",
    ),
    "old plan": Scenario(
        (
            command(f"apply plan.json {RUN} --json"),
            command("plan recipe.yaml --threads 2 --diff plan.json"),
            command(f"apply plan.json {RUN} -o stale", before=(("touch", "rl/model.safetensors", ""),)),
        ),
        family("qwen2"), {"recipe.yaml": PAST}, "plan",
    ),
    "old lock": Scenario(
        (
            command("lint recipe.yaml"),
            command("lint recipe.yaml", before=(("replace", "recipe.yaml", "acme/rl@main=>acme/other@main"),)),
            command("plan recipe.yaml --locked"),
        ),
        {}, {}, "lock",
    ),
    "old staging": Scenario(
        (command(f"apply recipe.yaml {RUN}"), command("verify merged --json")),
        family("mixtral"), {"recipe.yaml": SMALL_SHARDS}, "staging",
    ),
    "old staging, other recipe": Scenario(
        (command(f"apply recipe.yaml {RUN}"),), family("mixtral"), {"recipe.yaml": PAST}, "staging",
    ),
    "old staging of a skill": Scenario(
        (command(f"apply recipe.yaml {RUN}"), command("verify blend --json")),
        family("llama"), {"recipe.yaml": KEEP.replace("./kept", "./blend, shard_size: 8KB")}, "skill-staging",
    ),
}  # fmt: skip
"""Name -> what is played."""

OTHER_DONOR = Scenario(
    (), family("mixtral"),
    {"recipe.yaml": SMALL_SHARDS.replace("lam * (rl - sft)", "rl - sft").replace("coefficients:\n  lam: 0.7\n", "")},
    "donor-staging",
)  # fmt: skip
"""Of this text version 0.1.0 took `sft` for the donor."""
