"""Turn a Llama GGUF file into the folder that our loader and transformers read: weights, config and tokenizer."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tqdm import tqdm

CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf_path: Path, folder: Path, bar: tqdm) -> None:
    """Write config, tokenizer and bf16 weights of `gguf_path` into `folder`; `bar` counts the tensors."""
    reader = GGUFReader(gguf_path)
    _write_json(folder / "config.json", config_of(reader))
    _write_json(folder / "generation_config.json", _special_ids(reader))
    tokenizer_of(reader).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config_of(reader))
    bar.reset(total=len(reader.tensors))
    tensors = {}
    for name, tensor in read_tensors(reader):
        tensors[name] = tensor.to(torch.bfloat16)
        bar.update()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors keeps others from reading it


def read_tensors(reader: GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in fp32 under its Hugging Face name, q and k rows in Hugging Face order."""
    num_heads = {
        "attn_q": _number(reader, "llama.attention.head_count"),
        "attn_k": _number(reader, "llama.attention.head_count_kv"),
    }
    for stored in reader.tensors:
        weight = torch.tensor(
            dequantize(stored.data, stored.tensor_type)
        )  # [out, in]; a copy: fp32 is a view of the file
        part = stored.name.removesuffix(".weight").split(".")[-1]
        if part in num_heads:
            weight = halves_from_pairs(weight, num_heads[part])
        yield hugging_face_name(stored.name), weight


def hugging_face_name(gguf_name: str) -> str:
    """Rename a tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", gguf_name).groups()  # type: ignore[union-attr]
    prefix = f"model.layers.{layer}." if layer else ""
    return f"{prefix}{TENSOR_NAMES[part]}.weight"


def halves_from_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order, which rotates neighbours: rows 0 8 1 9 2 10 ... of a head -> 0 1 2 ... 15."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def config_of(reader: GGUFReader) -> dict[str, object]:
    """Build the config.json that transformers would have written for this model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": _number(reader, "llama.vocab_size"),
        "hidden_size": _number(reader, "llama.embedding_length"),
        "intermediate_size": _number(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _number(reader, "llama.block_count"),
        "num_attention_heads": _number(reader, "llama.attention.head_count"),
        "num_key_value_heads": _number(reader, "llama.attention.head_count_kv"),
        "max_position_embeddings": _number(reader, "llama.context_length"),
        # GGUF holds it in fp32; seven digits bring the 1e-05 back that was meant
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        **_special_ids(reader),
        "dtype": "bfloat16",
    }


def tokenizer_of(reader: GGUFReader) -> Tokenizer:
    """Build the model's own byte-level BPE; the tokenizer that transformers makes of a GGUF forgets the digits."""
    tokens, merges = _list(reader, "tokenizer.ggml.tokens"), _list(reader, "tokenizer.ggml.merges")
    left_right = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, left_right))
    # `tokenizer.ggml.pre = smollm`: every digit is a token of its own ("67" -> 6, 7)
    byte_level = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), byte_level])
    tokenizer.decoder = ByteLevelDecoder()
    kinds = _list(reader, "tokenizer.ggml.token_type")
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return tokenizer


def tokenizer_config_of(reader: GGUFReader) -> dict[str, object]:
    tokens = _list(reader, "tokenizer.ggml.tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[_number(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _number(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **special,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }


def _special_ids(reader: GGUFReader) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: _number(reader, f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}


def _number(reader: GGUFReader, name: str) -> int:
    return int(reader.fields[name].contents())


def _field(reader: GGUFReader, name: str) -> object:
    return reader.fields[name].contents()


def _list(reader: GGUFReader, name: str) -> list:
    return list(reader.fields[name].contents())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
