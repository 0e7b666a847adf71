"""The card that goes to the Hub with a model: what it says, and whose words it keeps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import run_cli, write_recipe
from hub_server import HubServer
from huggingface_hub import ModelCard
from published import MERGED, put_on_the_hub

import skillmerge
from skillmerge.errors import UsageError
from skillmerge.outputs.hub.card import write_card
from skillmerge.recipes.recipe import Push

# --------------------------------------------------------------------------------------------------------- the card


def card_of(hub: HubServer) -> ModelCard:
    return ModelCard(hub.content(MERGED, "README.md").decode())


def test_card_names_parents_and_what_was_done(hub: HubServer, licensed: Path, tmp_path: Path) -> None:
    models = put_on_the_hub(hub, licensed)
    models["sft"] = str(licensed.parent / "sft")
    (tmp_path / "work").mkdir()
    schedule = {"default": 1.0, "rules": [{"layers": "0-", "ramp": [0.0, 1.0]}]}
    work = write_recipe(tmp_path / "work", models=models, coefficients={"lam": schedule})
    skillmerge.apply(work, push=MERGED)
    card = card_of(hub)
    assert card.data.to_dict() == {
        "base_model": ["acme/target", "acme/rl"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "mit",
        "tags": ["merge", "skillmerge"],
    }
    text = card.text
    assert "lam over model.layers: 0 ▁▅█ 2  (0 to 1)" in text
    assert f"[acme/rl](https://huggingface.co/acme/rl) | `{hub.repos['acme/rl'].refs['main']}`" in text
    assert "local: 2 files" in text
    assert "effective λ" in text
    assert '"merge": "target + lam * (rl - sft)"' in text
    assert str(tmp_path) not in text.replace(work.read_text().strip(), "")


BODY = """\
# merged

A merge of 3 models by `target + lam * (rl - sft)`, computed by skillmerge VERSION: 12 tensors, 9.0 KB.

## Parents

| name | model | commit | license |
| --- | --- | --- | --- |
| `target` (donor) | local: 2 files, 8.0 KB | - | - |
| `rl` | local: 2 files, 8.0 KB | - | - |
| `sft` | local: 2 files, 8.0 KB | - | - |

## Recipe

```yaml
<recipe>
```

```
lam over model.layers: 0 ▁▅█ 2  (0 to 1)
```

| lam | attention | mlp | norm | embedding | head |
| --- | --- | --- | --- | --- | --- |
| model.layers 0 | 0 | 0 | 0 | - | - |
| model.layers 1 | 0.5 | 0.5 | 0.5 | - | - |
| model.layers 2 | 1 | 1 | 1 | - | - |
| outside blocks | - | - | 1 | 1 | 1 |

## Effect of rounding

Measured on a sample of blocks.

| module | requested λ | effective λ | lost | changed |
| --- | --- | --- | --- | --- |
| attention | 0.769 | 0.761 | 6.6% | 82.8% |
| mlp | 0.738 | 0.734 | 7.1% | 81.7% |
| norm | 0.891 | 0.91 | 2.4% | 83.3% |
| embedding | 1 | 0.999 | 0.2% | 90.4% |
| head | 1 | 1 | 0.7% | 87.5% |
| all | 0.854 | 0.852 | 4.3% | 84.8% |

## Use

```python
from transformers import AutoModelForCausalLM  # or the class for its task

model = AutoModelForCausalLM.from_pretrained("acme/merged")
```

## Proof

`skillmerge.manifest.json` names every input with its commit and digests, the action on each tensor, and the
sha256 of every file. Plan `<digest>`. `skillmerge verify` checks every byte. With the recipe
and the commits above, `skillmerge apply` reproduces the same bytes.
"""


def test_skill_goes_to_the_hub_and_is_used_from_there(hub: HubServer, licensed: Path, tmp_path: Path) -> None:
    models = put_on_the_hub(hub, licensed)
    skill = skillmerge.extract(models["rl"], models["sft"], tmp_path / "math").output
    published = skillmerge.push(skill, "acme/math-skill")
    assert {"skill.json", "README.md"} < set(hub.tree("acme/math-skill"))
    card = ModelCard(hub.content("acme/math-skill", "README.md").decode())
    assert card.data.base_model == ["acme/rl", "acme/sft"]
    assert card.data.library_name == "skillmerge"
    assert "base_model_relation" not in card.data.to_dict()
    assert "It is not a model" in card.text
    (tmp_path / "work").mkdir()
    used = {"target": models["target"], "math": {"skill": f"hf://acme/math-skill@{published.commit}"}}
    stored = skillmerge.apply(write_recipe(tmp_path / "work", "target + lam * math", models=used)).output
    direct = skillmerge.apply(licensed, tmp_path / "direct").output
    assert {p.name: p.read_bytes() for p in stored.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in direct.glob("*.safetensors")
    }


def test_card_reads_as_it_should(licensed: Path) -> None:
    schedule = {"default": 1.0, "rules": [{"layers": "0-", "ramp": [0.0, 1.0]}]}
    text = write_recipe(licensed.parent, coefficients={"lam": schedule}).read_text()
    for model in ("target", "sft", "rl"):
        (licensed.parent / model / "config.json").unlink()
        (licensed.parent / model / "README.md").unlink()
    card = write_card(skillmerge.apply(licensed).manifest, Push(MERGED), "mit")
    found = re.sub(r"[0-9a-f]{64}", "<digest>", card.replace(text.strip(), "<recipe>"))
    assert found.split("---\n\n", 1)[1] == BODY.replace("VERSION", skillmerge.__version__)


def test_licences_that_differ_have_to_be_settled(hub: HubServer, licensed: Path) -> None:
    (licensed.parent / "rl" / "README.md").unlink()
    output = skillmerge.apply(licensed).output
    with pytest.raises(UsageError, match=r"target: mit, rl: none, sft: mit"):
        skillmerge.push(output, MERGED)
    assert MERGED not in hub.repos
    skillmerge.push(output, MERGED, license="apache-2.0")
    assert card_of(hub).data.license == "apache-2.0"


def test_card_by_hand_keeps_its_words(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\ntags: [mine]\nlanguage: en\n---\n\n# By hand\n\nExactly  so.\n")
    skillmerge.push(finished, MERGED, card=card, tags=("math",))
    found = card_of(hub)
    assert found.text.endswith("\n# By hand\n\nExactly  so.\n")
    assert found.data.tags == ["mine", "merge", "skillmerge", "math"]
    assert (found.data.language, found.data.license) == ("en", "mit")


def test_licence_that_is_not_settled_is_settled_in_the_words_of_the_command(family: Path) -> None:
    assert run_cli("apply", family, "-q").returncode == 0
    told = (
        "the license of the merge is undeclared, and the parents' licenses differ or are missing "
        "(target: none, rl: none, sft: none)"
    )
    process = run_cli("push", family.parent / "merged", "acme/merged")
    assert (process.returncode, process.stderr) == (
        2, f"error: {told}\nhelp: check the parents' licenses, then declare it: `--license apache-2.0`\n"
    )  # fmt: skip
    process = run_cli("apply", family, "-q", "--push", "acme/merged", "--set", "lam=0.5", "--overwrite")
    declare = "declare it in the recipe:\noutput:\n  license: apache-2.0"
    assert (process.returncode, process.stderr) == (
        2,
        f"error: {told}\nhelp: check the parents' licenses, then {declare}\n",
    )
