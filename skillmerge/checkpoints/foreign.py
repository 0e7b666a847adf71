"""Places without weights that skillmerge reads: what they are, by file names, and how to convert them to a model.

One table of data. Knows names and first bytes of files, never what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

_PAGE = "is a web page, not the file itself"
_AGAIN = "fetch the file again: an error or a login page was saved in its place"
_SAVE = "load it with transformers and save it: `AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)`"
_OLD = "load it with transformers 4 and save it: `AutoModel.from_pretrained(FOLDER, {}=True).save_pretrained(NEW)`"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A way in which other tools keep weights.

    marks: globs of names below the place, each of which has to match a file; `|` separates alternatives. what: what it
    is. fix: how to make a model of it, with `{folder}` for the folder of the first mark's file, `{file}` for that file
    and `{name}` for its first part.
    """

    marks: tuple[str, ...]
    what: str
    fix: str


FOREIGN = (
    Foreign(
        ("*model_world_size_*_rank_*.pt",),
        "the FSDP ranks of a verl run",
        "merge them: `python -m verl.model_merger merge --backend fsdp --local_dir {folder} --target_dir NEW`",
    ),
    Foreign(
        ("*dist_ckpt/*.distcp|*dist_ckpt/common.pt",),
        "a Megatron checkpoint of a verl run",
        "merge it: `python -m verl.model_merger merge --backend megatron --local_dir FOLDER --target_dir NEW`, where "
        "FOLDER holds dist_ckpt",
    ),
    Foreign(
        ("*pytorch_model_fsdp_*/*.distcp",),
        "FSDP shards that accelerate wrote",
        "merge them: `accelerate merge-weights {folder} NEW`, and put config and tokenizer files beside the result",
    ),
    Foreign(
        ("*zero_pp_rank_*_model_states.pt|*zero_pp_rank_*_optim_states.pt|*mp_rank_*_model_states.pt|zero_to_fp32.py",),
        "a DeepSpeed ZeRO checkpoint",
        "gather it: `python {place}/zero_to_fp32.py {place} NEW --safe_serialization`, and put config and tokenizer "
        "files beside the result",
    ),
    Foreign(
        ("*iter_*/mp_rank_*|*latest_checkpointed_iteration.txt|*model_optim_rng.pt|iter_*/*.distcp|common.pt",),
        "a Megatron-LM checkpoint",
        "export it with Megatron Bridge: `AutoBridge.from_hf_pretrained(ORIGINAL).export_ckpt(ITERATION, NEW)`",
    ),
    Foreign(
        ("*.nemo|weights/*.distcp|context/model.yaml|context/io.json|model_weights/*",),
        "a NeMo checkpoint",
        "export it: `nemo.collections.llm.export_ckpt(path=FOLDER, target=\"hf\", output_path=NEW)`",
    ),
    Foreign(
        ("*.distcp",),
        "a torch.distributed checkpoint (DCP)",
        "gather it: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt`; then load "
        "that into its model and call `save_pretrained`",
    ),
    Foreign(
        ("pytorch_model_fsdp.bin|pytorch_model_fsdp_*.bin",),
        "weights that FSDP saved as a pickle",
        "load them into their model (`load_state_dict`) and call `save_pretrained`",
    ),
    Foreign(
        ("_CHECKPOINT_METADATA|*_METADATA|*manifest.ocdbt|*.orbax-checkpoint*|*ocdbt.process_*",),
        "an Orbax checkpoint (JAX)",
        "export it with the trainer that wrote it (MaxText: `python -m maxtext.checkpoint_conversion.to_huggingface`)",
    ),
    Foreign(
        ("*.gguf",),
        "a GGUF model for llama.cpp",
        "use the checkpoint that it was converted from; without it: `AutoModelForCausalLM.from_pretrained(FOLDER, "
        "gguf_file=\"{file}\").save_pretrained(NEW)`, which keeps what quantization has lost",
    ),
    Foreign(
        ("model_index.json",),
        "a diffusers pipeline",
        "name one of its parts, such as `{place}/transformer` or `{place}/text_encoder`",
    ),
    Foreign(
        ("diffusion_pytorch_model*.safetensors.index.json",),
        "a sharded part of a diffusers pipeline, under names of its own",
        "save it as one file: `save_pretrained(NEW, max_shard_size=\"1TB\")`",
    ),
    Foreign(
        ("snapshots/*/*", "refs/*|blobs/*"),
        "a repository in the Hub's cache",
        "name its snapshot, `{folder}`, or the repository: `hf://org/name`",
    ),
    Foreign(
        ("modules.json", "*/*.safetensors|1_Pooling/config.json"),
        "a sentence-transformers model in parts",
        "name the part that holds the weights, such as `{place}/0_Transformer`",
    ),
    Foreign(
        ("checkpoint-*/*.safetensors|checkpoint-*/*.index.json",),
        "a training run with its checkpoints",
        "name one of them, such as `{place}/{name}`",
    ),
    Foreign(
        ("consolidated.*.pth", "params.json"),
        "weights as Meta publishes them",
        "use the model's Hugging Face form, or convert it: `python -m "
        "transformers.models.llama.convert_llama_weights_to_hf --input_dir {folder} --output_dir NEW`",
    ),
    Foreign(
        ("tf_model*.h5|saved_model.pb|*.ckpt.index|*.ckpt-*.index", ),
        "TensorFlow weights",
        _OLD.format("from_tf"),
    ),
    Foreign(("flax_model*.msgpack|*.msgpack",), "Flax weights", _OLD.format("from_flax")),
    Foreign(
        ("*.weights.h5|*.keras|*.h5",),
        "Keras weights",
        "export it with the library that wrote it, as safetensors (KerasHub: `export_to_transformers`)",
    ),
    Foreign(
        ("weights*.npz|*.npz",),
        "MLX or NumPy arrays",
        "use the checkpoint that it was converted from, or save the arrays with safetensors under their Hugging Face "
        "names",
    ),
    Foreign(
        ("*.onnx|*.engine|*.plan|openvino_model.xml|openvino_model.bin|*.mlmodel|*.tflite",),
        "a model compiled for a runtime",
        "use the checkpoint that it was made from",
    ),
    Foreign(
        ("model.bin", "vocabulary.json|vocabulary.txt|shared_vocabulary.json|shared_vocabulary.txt"),
        "a CTranslate2 model",
        "use the checkpoint that it was converted from",
    ),
    Foreign(
        ("gptq_model*.bin|gptq_model*.pt|*-4bit-*.pt|awq_model*.pt|quantize_config.json",),
        "a quantized model (GPTQ or AWQ)",
        "use the checkpoint that it was quantized from",
    ),
    Foreign(
        ("*.incomplete|*.crdownload|*.part|*.aria2|*.download|*.filepart",),
        "an unfinished download",
        "fetch it again: `hf download ORG/NAME --local-dir FOLDER`",
    ),
    Foreign(
        ("*.zip|*.tar|*.tar.gz|*.tgz|*.tar.zst|*.7z",),
        "an archive",
        "unpack it, and name the folder that holds the model",
    ),
    Foreign(
        ("epoch=*.ckpt|*.ckpt",),
        "a checkpoint of a trainer (a pickle)",
        "load it into its model with that trainer, and call `save_pretrained`",
    ),
    Foreign(
        ("*.parquet|*.arrow|*.jsonl|dataset_info.json",), "a data set", "name a folder that holds a model"
    ),
)  # fmt: skip
"""The first that matches counts: what is found inside another tool's folder stands behind it."""

STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself",
     "fetch the files: `git lfs pull`, or `hf download ORG/NAME`"),
    (b"# xet version", "is a Git Xet pointer, not the file itself",
     "fetch the files: `git xet checkout`, or `hf download ORG/NAME`"),
    (b"/annex/objects", "is a git-annex pointer, not the file itself", "fetch the files: `git annex get`"),
    (b"PK\x03\x04", "is a pickle that torch.save wrote, under another name", _SAVE),
    (b"\x80\x02", "is a pickle, under another name", _SAVE),
    (b"\x80\x04", "is a pickle, under another name", _SAVE),
    (b"GGUF", "is a GGUF file, under another name", "use the checkpoint that it was converted from"),
    (b"<!DOCTYP", _PAGE, _AGAIN),
    (b"<!doctyp", _PAGE, _AGAIN),
    (b"<html", _PAGE, _AGAIN),
    (b"Entry not found", "is an error of the Hub, not the file itself",
     "fetch the file again: check its name and revision"),
    (b"Invalid username or password", "is an error of the Hub, not the file itself",
     "fetch the file again: check your token"),
    (b"Access to model", "is an error of the Hub, not the file itself",
     "ask for access on the model's page, then fetch the file again"),
    (b"\x1f\x8b", "is compressed with gzip", "unpack it: `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard", "unpack it: `unzstd`"),
    (b"\x89HDF", "is an HDF5 file, under another name", _SAVE),
    (b"\0" * 8, "begins with zeros: a download that was never finished", "fetch the file again"),
)  # fmt: skip
"""First bytes of files that are not what their names say: bytes, description, fix. Pointers come first."""
_POINTERS = 3

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAVE = "pickles can run code and are never loaded; " + _SAVE


def recognised(names: Iterable[str], place: str, local: bool) -> tuple[str, str] | None:
    """Return what is in a place with these files, and what makes a model of it; None if that is not known.

    local: whether the place is a folder, so that commands can name it.
    """
    names = sorted(names)
    for foreign in FOREIGN:
        found = [_first(mark, names) for mark in foreign.marks]
        if (first := found[0]) is None or None in found:
            continue
        folder, _, file = first.rpartition("/")
        inside = f"{place}/{folder}".rstrip("/") if local else "FOLDER"
        fix = foreign.fix.format(folder=inside, file=file, name=first.split("/")[0], place=place if local else "FOLDER")
        return foreign.what, fix
    return None


def _first(mark: str, names: Iterable[str]) -> str | None:
    """Return the first name that a mark's globs match; where one matches in several folders, the last folder by
    number."""
    globs = mark.split("|")
    matching = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
    return max(matching, key=_by_number) if matching else None


def _by_number(name: str) -> tuple[list[int], str]:
    """Later checkpoints count more, names that sort earlier too."""
    folder, _, file = name.rpartition("/")
    return [int(digits) for digits in re.findall(r"\d+", folder)], "".join(chr(0x10FFFF - ord(it)) for it in file)


def disguised(start: bytes, *, text: bool = False) -> tuple[str, str] | None:
    """Return what a file really is that begins so, and what to do, where that is known.

    start: its first 32 bytes. text: whether it may hold any text, so that only pointers are told from it.
    """
    rows = STARTS[:_POINTERS] if text else STARTS
    return next(((what, fix) for begins, what, fix in rows if start.startswith(begins)), None)
