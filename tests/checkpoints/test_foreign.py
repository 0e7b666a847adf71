"""Places and files of other tools: what is said of each, whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import about_model, run_cli, write_family
from safetensors.torch import load_file, save_file

from skillmerge.checkpoints.foreign import FOREIGN, recognised

SHARD = "model-0000{}-of-00002.safetensors"
_SAVE = "load it with transformers and save it: `AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)`"
_CONFIG = "and put config and tokenizer files beside the result"
FOLDERS = {
    "actor/model_world_size_8_rank_0.pt actor/huggingface/config.json actor/optim_world_size_8_rank_0.pt": (
        "holds the FSDP ranks of a verl run, not a model in safetensors",
        "merge them: `python -m verl.model_merger merge --backend fsdp --local_dir {rl}/actor --target_dir NEW`",
    ),
    "dist_ckpt/__0_0.distcp dist_ckpt/common.pt huggingface/config.json": (
        "holds a Megatron checkpoint of a verl run, not a model in safetensors",
        "merge it: `python -m verl.model_merger merge --backend megatron --local_dir FOLDER --target_dir NEW`, where "
        "FOLDER holds dist_ckpt",
    ),
    ".metadata __0_0.distcp __1_0.distcp": (
        "holds a torch.distributed checkpoint (DCP), not a model in safetensors",
        "gather it: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {rl} model.pt`; then load that "
        "into its model and call `save_pretrained`",
    ),
    "pytorch_model_fsdp_0/.metadata pytorch_model_fsdp_0/__0_0.distcp": (
        "holds FSDP shards that accelerate wrote, not a model in safetensors",
        f"merge them: `accelerate merge-weights {{rl}}/pytorch_model_fsdp_0 NEW`, {_CONFIG}",
    ),
    "latest zero_to_fp32.py global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt": (
        "holds a DeepSpeed ZeRO checkpoint, not a model in safetensors",
        f"gather it: `python {{rl}}/zero_to_fp32.py {{rl}} NEW --safe_serialization`, {_CONFIG}",
    ),
    "latest_checkpointed_iteration.txt iter_0000100/mp_rank_00/model_optim_rng.pt": (
        "holds a Megatron-LM checkpoint, not a model in safetensors",
        "export it with Megatron Bridge: `AutoBridge.from_hf_pretrained(ORIGINAL).export_ckpt(ITERATION, NEW)`",
    ),
    "context/model.yaml weights/__0_0.distcp weights/metadata.json": (
        "holds a NeMo checkpoint, not a model in safetensors",
        'export it: `nemo.collections.llm.export_ckpt(path=FOLDER, target="hf", output_path=NEW)`',
    ),
    "_CHECKPOINT_METADATA manifest.ocdbt d/abc": (
        "holds an Orbax checkpoint (JAX), not a model in safetensors",
        "export it with the trainer that wrote it (MaxText: `python -m maxtext.checkpoint_conversion.to_huggingface`)",
    ),
    "qwen-q4_k_m.gguf config.json": (
        "holds a GGUF model for llama.cpp, not a model in safetensors",
        "use the checkpoint that it was converted from; without it: `AutoModelForCausalLM.from_pretrained(FOLDER, "
        'gguf_file="qwen-q4_k_m.gguf").save_pretrained(NEW)`, which keeps what quantization has lost',
    ),
    "model_index.json transformer/diffusion_pytorch_model.safetensors vae/config.json": (
        "holds a diffusers pipeline, not a model in safetensors",
        "name one of its parts, such as `{rl}/transformer` or `{rl}/text_encoder`",
    ),
    "diffusion_pytorch_model-00001-of-00002.safetensors diffusion_pytorch_model-00002-of-00002.safetensors "
    "diffusion_pytorch_model.safetensors.index.json": (
        "holds a sharded part of a diffusers pipeline, under names of its own, not a model in safetensors",
        'save it as one file: `save_pretrained(NEW, max_shard_size="1TB")`',
    ),
    "refs/main blobs/ab snapshots/c0ffee/config.json snapshots/c0ffee/model.safetensors": (
        "holds a repository in the Hub's cache, not a model in safetensors",
        "name its snapshot, `{rl}/snapshots/c0ffee`, or the repository: `hf://org/name`",
    ),
    "trainer_state.json checkpoint-500/model.safetensors checkpoint-1000/model.safetensors": (
        "holds a training run with its checkpoints, not a model in safetensors",
        "name one of them, such as `{rl}/checkpoint-1000`",
    ),
    "consolidated.00.pth params.json tokenizer.model": (
        "holds weights as Meta publishes them, not a model in safetensors",
        "use the model's Hugging Face form, or convert it: `python -m "
        "transformers.models.llama.convert_llama_weights_to_hf --input_dir {rl} --output_dir NEW`",
    ),
    "tf_model.h5 config.json": (
        "holds TensorFlow weights, not a model in safetensors",
        "load it with transformers 4 and save it: "
        "`AutoModel.from_pretrained(FOLDER, from_tf=True).save_pretrained(NEW)`",
    ),
    "flax_model.msgpack config.json": (
        "holds Flax weights, not a model in safetensors",
        "load it with transformers 4 and save it: "
        "`AutoModel.from_pretrained(FOLDER, from_flax=True).save_pretrained(NEW)`",
    ),
    "weights.npz config.json": (
        "holds MLX or NumPy arrays, not a model in safetensors",
        "use the checkpoint that it was converted from, or save the arrays with safetensors under their Hugging Face "
        "names",
    ),
    "model.onnx config.json": (
        "holds a model compiled for a runtime, not a model in safetensors", "use the checkpoint that it was made from"
    ),
    "quantize_config.json gptq_model-4bit-128g.pt": (
        "holds a quantized model (GPTQ or AWQ), not a model in safetensors",
        "use the checkpoint that it was quantized from",
    ),
    "model.safetensors.incomplete config.json": (
        "holds an unfinished download, not a model in safetensors",
        "fetch it again: `hf download ORG/NAME --local-dir FOLDER`",
    ),
    "model.tar.gz": (
        "holds an archive, not a model in safetensors", "unpack it, and name the folder that holds the model"
    ),
    "epoch=3-step=100.ckpt": (
        "holds a checkpoint of a trainer (a pickle), not a model in safetensors",
        "load it into its model with that trainer, and call `save_pretrained`",
    ),
    "train.parquet dataset_info.json": (
        "holds a data set, not a model in safetensors", "name a folder that holds a model"
    ),
    "pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin pytorch_model.bin.index.json": (
        "has no *.safetensors, only pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin",
        f"pickles can run code and are never loaded; {_SAVE}",
    ),
}  # fmt: skip
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22ead\nsize 12345\n"
FETCH = "fetch the files: `git lfs pull`, or `hf download ORG/NAME`"
PAGE = (
    "is a web page, not the file itself",
    "fetch the file again: an error or a login page was saved in its place",
)
STARTS = {
    "pointer": (_LFS, "is a Git LFS pointer, not the file itself", FETCH),
    "xet": (
        b"# xet version 0\nfilesize = 1\n", "is a Git Xet pointer, not the file itself",
        "fetch the files: `git xet checkout`, or `hf download ORG/NAME`",
    ),
    "torch": (b"PK\x03\x04\x00\x00" + bytes(90), "is a pickle that torch.save wrote, under another name", _SAVE),
    "pickle": (b"\x80\x02}q\x00" + bytes(90), "is a pickle, under another name", _SAVE),
    "gguf": (b"GGUF\x03" + bytes(90), "is a GGUF file, under another name",
             "use the checkpoint that it was converted from"),
    "page": (b"<!DOCTYPE html><html></html>", *PAGE),
    "error": (b"Entry not found", "is an error of the Hub, not the file itself",
              "fetch the file again: check its name and revision"),
    "zeros": (bytes(4096), "begins with zeros: a download that was never finished", "fetch the file again"),
}  # fmt: skip


def place(folder: Path, names: str) -> Path:
    """The family with files of other names, each of one byte, in place of `rl`."""
    recipe = write_family(folder, shards=1)
    for file in (folder / "rl").iterdir():
        file.unlink()
    for name in names.split(" "):
        path = folder / "rl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return recipe


@pytest.mark.parametrize("names", FOLDERS)
def test_foreign_folder_is_named_with_what_makes_a_model_of_it(tmp_path: Path, names: str) -> None:
    recipe, (what, cure) = place(tmp_path, names), FOLDERS[names]
    rl = tmp_path / "rl"
    fix = f"help: {cure.replace('{rl}', str(rl))}\n"
    located = f"error: {about_model(recipe, 'rl', f'model `rl`: {rl} {what}')}\n{fix}"
    told = f"error: {rl} {what}\n{fix}"
    out = tmp_path / "out"
    for command, said in (
        (("plan", recipe), located),
        (("extract", "--from", rl, "--minus", tmp_path / "sft", "-o", out), told),
        (("inspect", tmp_path / "sft", rl), told),
    ):
        process = run_cli(*command)
        assert (process.returncode, process.stderr) == (4, said)


@pytest.mark.parametrize("kind", STARTS)
def test_foreign_file_under_the_name_of_weights_is_told(tmp_path: Path, kind: str) -> None:
    recipe, (content, what, cure) = write_family(tmp_path, shards=1), STARTS[kind]
    path = tmp_path / "rl" / "model.safetensors"
    path.write_bytes(content)
    process = run_cli("plan", recipe)
    assert (process.returncode, process.stderr) == (
        4,
        f"error: {about_model(recipe, 'rl', f'model `rl`: {path}: {what}')}\nhelp: {cure}\n",
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt"])
def test_foreign_pointer_is_never_carried_as_a_side_file(tmp_path: Path, file: str) -> None:
    recipe = write_family(tmp_path, shards=1)
    path = tmp_path / "target" / file
    path.write_bytes(_LFS)
    process = run_cli("apply", recipe)
    message = f"model `target`: {path}: is a Git LFS pointer, not the file itself"
    assert process.stderr == f"error: {about_model(recipe, 'target', message)}\nhelp: {FETCH}\n"
    assert (process.returncode, (tmp_path / "merged").exists()) == (4, False)


def test_foreign_pointer_in_the_place_of_an_index_is_told(tmp_path: Path) -> None:
    recipe = write_family(tmp_path, shards=2)
    path = tmp_path / "sft" / "model.safetensors.index.json"
    path.write_bytes(_LFS)
    message = about_model(recipe, "sft", f"model `sft`: {path}: is a Git LFS pointer, not the file itself")
    assert run_cli("plan", recipe).stderr.startswith(f"error: {message}\n")


def test_foreign_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    """Its size begins with the bytes that a pickle begins with."""
    recipe = write_family(tmp_path, {"w": (4,)}, shards=1)
    for name in ("target", "rl", "sft"):
        path = tmp_path / name / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size].rstrip().ljust(640)
        path.write_bytes((640).to_bytes(8, "little") + header + content[8 + size :])
    assert run_cli("plan", recipe).returncode == 0


def test_foreign_table_has_an_example_of_every_row() -> None:
    seen = {found[0] for names in FOLDERS if (found := recognised(names.split(" "), "x", True)) is not None}
    rare = {
        "weights that FSDP saved as a pickle", "Keras weights", "a CTranslate2 model",
        "a sentence-transformers model in parts",
    }  # fmt: skip
    assert {row.what for row in FOREIGN} - seen == rare


def test_foreign_shard_that_was_left_over_is_named(tmp_path: Path) -> None:
    recipe = write_family(tmp_path, shards=2)
    rl = tmp_path / "rl"
    tensors = {**load_file(rl / SHARD.format(1)), **load_file(rl / SHARD.format(2))}
    save_file(tensors, rl / SHARD.format(2), metadata={"format": "pt"})
    process = run_cli("plan", recipe)
    message, _, fix = process.stderr.partition("\nhelp: ")
    assert process.returncode == 4
    assert f": model `rl`: {rl}: tensor `" in message
    assert f"` is in both {SHARD.format(1)} and {SHARD.format(2)}\n" in message
    assert fix == (
        f"the index names {SHARD.format(1)}: {SHARD.format(2)} is probably left over from another save; save the model "
        "again into an empty folder (`save_pretrained`), or fetch it again\n"
    )
