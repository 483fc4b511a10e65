"""GPT-2 and Qwen3 weights in Hugging Face's layout, in and out.

A folder holds config.json and safetensors as transformers' GPT2LMHeadModel and Qwen3ForCausalLM
write them. Their embeddings have no padding, and a tied head is stored once. GPT-2's linear layers
are stored as (in, out) where ours are (out, in), and always have biases.
"""

import re
from pathlib import Path

import torch

import files
from config import Failure
from model import GPT, GPTConfig

INDEX = "model.safetensors.index.json"  # names the files of a model that is stored in several
FILES = ["config.json", "generation_config.json", "*.safetensors", INDEX]
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
QWEN3_NAMES = {  # our name: theirs
    "wte": "model.embed_tokens",
    "ln_1": "input_layernorm",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "ln_f": "model.norm",
    "lm_head": "lm_head",
}
SHAPE_NAMES = {  # field of GPTConfig: its name in config.json
    "gpt2": {"block_size": "n_positions"}
    | {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
    "qwen3": {
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_kv_head": "num_key_value_heads",
        "head_size": "head_dim",
        "intermediate_size": "intermediate_size",
    },
}
DERIVED = {"n_kv_head": "kv_heads", "head_size": "head_width", "intermediate_size": "mlp_width"}
FIXED = {  # what config.json says of every supported model
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "quantization_config": None,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_scaling": None,
        "quantization_config": None,
    },
}
EMBEDDINGS = ("transformer.wte.weight", "model.embed_tokens.weight")
MASKS = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"  # in older files of GPT-2, not weights


def is_complete(folder: Path) -> bool:
    """Whether config.json and all files of weights are there. Raises Failure for a bad index."""
    return all(path.is_file() for path in [folder / "config.json", *weight_files(folder)])


def weight_files(folder: Path) -> list[Path]:
    """The file of weights in a folder, or the files that its index names."""
    path = folder / "model.safetensors"
    if path.exists() or not (folder / INDEX).exists():
        return [path]
    weight_map = files.read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise Failure(f"{folder / INDEX} has no object weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:  # a path could lead out of the folder
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise Failure(f"{folder / INDEX} names {name!r}, and not a .safetensors file beside it")
    return [folder / name for name in names]


@torch.no_grad()
def load(folder: Path, dropout: float = 0.0) -> GPT:
    """The model in a Hugging Face folder, in fp32. Raises Failure.

    Tensors are read one at a time, so that memory holds the model and one tensor.
    """
    safetensors = require_safetensors()
    model = GPT(read_config(folder, dropout))
    for table in (model.wte, model.lm_head):
        table.weight[model.config.vocab_size :] = 0  # the padding, which no file has
    weights = hf_layout(model)
    missing = set(weights)
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    fill(weights, missing, name, file, path)
        except safetensors.SafetensorError as error:
            raise Failure(f"{path} is damaged: {error}") from None
    if missing:
        raise Failure(f"{folder} lacks {len(missing)} of the model's weights: {min(missing)} ...")
    return model


def save(model: GPT, folder: Path, end_of_text: int, dtype: torch.dtype = torch.float32):
    """Write `model` as a Hugging Face folder, each file complete or not at all.

    end_of_text: the token that begins and ends texts. dtype: of the weights.
    """
    safetensors, config = require_safetensors(), model.config
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    names = SHAPE_NAMES[config.arch].items()
    shape = {theirs: getattr(config, DERIVED.get(ours, ours)) for ours, theirs in names}
    if config.arch == "qwen3":
        shape |= {"rope_theta": config.rope_theta, "tie_word_embeddings": config.tie_embeddings}
    else:  # transformers' own default is 0.1
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    kind = {"model_type": config.arch, "torch_dtype": str(dtype).removeprefix("torch.")}
    weights = hf_layout(model)
    if config.arch == "gpt2" and not config.bias:
        names = [name for name in weights if ".wte." not in name and ".wpe." not in name]
        for name in names:  # a file of GPT-2 always has biases
            weights[name.replace(".weight", ".bias")] = torch.zeros(weights[name].size(-1))
    weights = {name: weight.to("cpu", dtype).contiguous() for name, weight in weights.items()}
    files.write_json(folder / "config.json", kind | FIXED[config.arch] | ends | shape)
    files.write_json(folder / "generation_config.json", ends)
    with files.atomic_file(folder / "model.safetensors") as file:
        try:
            safetensors.torch.save_file(weights, file.name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{folder} could not be written; is the disk full? ({error})") from None


def read_config(folder: Path, dropout: float) -> GPTConfig:
    """The shape in a folder's config.json. Raises Failure for another architecture."""
    path = folder / "config.json"
    content = files.read_json(path)
    arch = content.get("model_type")
    if arch not in list(FIXED):
        raise Failure(f"{path}: model_type {arch!r:.99} is not supported, only gpt2 and qwen3")
    for name, value in FIXED[arch].items():
        if name != "architectures" and content.get(name, value) != value:
            raise Failure(f"{path}: {name} {content[name]!r:.99} is not supported, only {value!r}")
    shape = {name: content.get(theirs) for name, theirs in SHAPE_NAMES[arch].items()}
    if not all(type(value) is int and value > 0 for value in shape.values()):
        raise Failure(f"{path}: sizes must be whole numbers above 0, not {shape!s:.300}")
    if arch == "qwen3":
        shape["rope_theta"] = read_rope_theta(content, path)
        shape["tie_embeddings"] = content.get("tie_word_embeddings", False) is True
        if content.get("layer_types") not in (None, ["full_attention"] * shape["n_layer"]):
            raise Failure(f"{path}: layer_types other than full_attention are not supported")
    try:
        return GPTConfig(arch=arch, dropout=dropout, **shape)
    except ValueError as error:
        raise Failure(f"{path}: {error}") from None


def read_rope_theta(content: dict, path: Path) -> float:
    """Return RoPE's base, from where transformers 5 or earlier versions write it."""
    rope = content.get("rope_parameters") or {"rope_theta": content.get("rope_theta")}
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    is_default = rope in ({"rope_theta": theta}, {"rope_theta": theta, "rope_type": "default"})
    if not is_default or type(theta) not in (int, float):
        raise Failure(f"{path}: RoPE {rope!r:.99} is not supported, only a plain rope_theta")
    return theta


def hf_layout(model: GPT) -> dict[str, torch.Tensor]:
    """The weights by their names in a file, as views in the shapes they have there."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in ("wte.weight", "lm_head.weight"):
        if name in weights:  # a tied head has no name of its own
            weights[name] = weights[name][: model.config.vocab_size]
    if model.config.arch == "qwen3":
        return {qwen3_name(name): weight for name, weight in weights.items()}
    return {
        f"transformer.{name}": weight.T if name.endswith(TRANSPOSED) else weight
        for name, weight in weights.items()
    }


def qwen3_name(name: str) -> str:
    """h.3.attn.c_q.weight is model.layers.3.self_attn.q_proj.weight."""
    layer, part = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.weight", name).groups()
    return f"{f'model.layers.{layer}.' if layer else ''}{QWEN3_NAMES[part]}.weight"


def fill(weights: dict, missing: set[str], name: str, file, path: Path):
    """Copy a tensor of a file into the weight of that name, and remove the name from `missing`.

    Raises Failure where the model has no such weight, or has got another tensor for it before.
    """
    names = [name, f"transformer.{name}"]  # older GPT-2 files have no prefix
    names += EMBEDDINGS if name == "lm_head.weight" else ()  # a tied head has either name, or both
    ours = next((known for known in names if known in weights), None)
    if not ours and re.fullmatch(MASKS, name):
        return
    if not ours:
        raise Failure(f"{path}: {name} is no weight of the model that config.json describes")
    tensor, weight = file.get_tensor(name), weights[ours]
    if tensor.shape != weight.shape:
        raise Failure(f"{path}: {name} has shape {[*tensor.shape]}, the model {[*weight.shape]}")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Failure(f"{path}: {name} is {tensor.dtype}; float32, bfloat16, float16 are supported")
    if ours not in missing and not torch.equal(weight, tensor.float()):
        raise Failure(f"{path}: {ours} is stored twice, as two tensors; one is named {name}")
    weight.copy_(tensor)
    missing.discard(ours)


def require_safetensors():
    """The package, or raise Failure."""
    try:
        import safetensors.torch
    except ImportError:
        raise Failure("a Hugging Face folder needs a package: pip install safetensors") from None
    return safetensors
