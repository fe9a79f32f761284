"""Tiny random models of the supported families, those that are refused, and text for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cats_ext.patching.exact.modules import ExactDown, ExactMLP
from cats_ext.patching.mlp import CatsMLP

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS = 128, 64, 176, 3

_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@dataclass(frozen=True)
class Family:
    """A model family: what it is called in the documentation, and how to configure a tiny one."""

    title: str
    model_type: str
    arguments: dict[str, Any] = field(default_factory=dict)
    activation: str = "silu"
    merged: bool = False  # gate and up are one projection


_SMALL_HEADS = {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32}
_EXPERTS |= {"num_experts_per_tok": 2}
_LATENT_ATTENTION = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
_LATENT_ATTENTION |= {"v_head_dim": 16, "num_key_value_heads": 4}
FAMILIES = {
    "llama": Family("Llama 2 and 3, Yi, DeepSeek LLM, SmolLM 1 and 2, TinyLlama", "llama"),
    "llama-bias": Family("the same with `mlp_bias`", "llama", {"mlp_bias": True}),
    "llama-relu": Family("the same with ReLU (ReLUfied models)", "llama", {"hidden_act": "relu"}, "relu"),
    "mistral": Family("Mistral 7B, sliding window", "mistral", {"sliding_window": 32}),
    "ministral": Family("Ministral", "ministral", {"sliding_window": 32, **_SMALL_HEADS}),
    "qwen2": Family("Qwen 1.5, 2 and 2.5", "qwen2"),
    "qwen3": Family("Qwen 3, dense", "qwen3", _SMALL_HEADS),
    "gemma": Family("Gemma", "gemma", _SMALL_HEADS, "gelu_tanh"),
    "gemma2": Family("Gemma 2", "gemma2", _SMALL_HEADS, "gelu_tanh"),
    "gemma3": Family("Gemma 3, text", "gemma3_text", _SMALL_HEADS, "gelu_tanh"),
    "phi3": Family("Phi-3, Phi-3.5 and Phi-4", "phi3", merged=True),
    "glm": Family("GLM 4 (9B)", "glm", _SMALL_HEADS, merged=True),
    "glm4": Family("GLM 4 (0414)", "glm4", _SMALL_HEADS, merged=True),
    "granite": Family("Granite 3, dense", "granite"),
    "olmo": Family("OLMo", "olmo"),
    "olmo2": Family("OLMo 2", "olmo2"),
    "olmo3": Family("OLMo 3", "olmo3"),
    "smollm3": Family("SmolLM3", "smollm3"),
    "stablelm": Family("StableLM", "stablelm"),
    "cohere": Family("Command R", "cohere"),
    "cohere2": Family("Command R7B, Command A", "cohere2", _SMALL_HEADS),
    "deepseek-v3": Family(
        "DeepSeek V3's architecture without routed layers",
        "deepseek_v3",
        {**_LATENT_ATTENTION, **_EXPERTS, "first_k_dense_replace": LAYERS},
    ),
    "ernie4_5": Family("ERNIE 4.5, dense", "ernie4_5", _SMALL_HEADS),
    "exaone4": Family("EXAONE 4", "exaone4", {"sliding_window": 32}),
    "helium": Family("Helium", "helium", _SMALL_HEADS),
    "hunyuan": Family("Hunyuan, dense", "hunyuan_v1_dense", _SMALL_HEADS),
    "seed-oss": Family("Seed-OSS, with its dropout of 0.1 set to 0", "seed_oss", {"residual_dropout": 0.0}),
    "vaultgemma": Family("VaultGemma", "vaultgemma", _SMALL_HEADS, "gelu_tanh"),
    "diffllama": Family("DiffLlama", "diffllama"),
}
MIXTURES = {
    "mixtral": Family("Mixtral", "mixtral", _EXPERTS),
    "qwen2-moe": Family("Qwen 1.5 and 2, mixtures", "qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3-moe": Family("Qwen 3, mixtures", "qwen3_moe", {**_EXPERTS, **_SMALL_HEADS}),
    "olmoe": Family("OLMoE", "olmoe", _EXPERTS),
    "phimoe": Family("Phi-3.5-MoE", "phimoe", _EXPERTS),
    "granitemoe": Family("Granite 3, mixtures", "granitemoe", _EXPERTS),
    "glm4-moe": Family("GLM 4.5 and later", "glm4_moe", {**_EXPERTS, **_SMALL_HEADS, "first_k_dense_replace": 1}),
    "deepseek-v2-routed": Family(
        "DeepSeek V2", "deepseek_v2", {**_EXPERTS, **_LATENT_ATTENTION, "first_k_dense_replace": 1, "n_group": 1}
    ),
    "deepseek-v3-routed": Family(
        "DeepSeek V3",
        "deepseek_v3",
        {**_EXPERTS, **_LATENT_ATTENTION, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "ernie4-5-moe": Family("ERNIE 4.5, mixtures", "ernie4_5_moe", {**_EXPERTS, **_SMALL_HEADS, "moe_k": 2}),
    "minimax-m2": Family("MiniMax M2", "minimax_m2", {**_EXPERTS, **_SMALL_HEADS}),
}
REFUSED = {
    "gpt-oss": Family("gpt-oss", "gpt_oss", {**_EXPERTS, **_SMALL_HEADS}),
    "llama4": Family("Llama 4", "llama4_text", _EXPERTS),
    "bitnet": Family("BitNet", "bitnet"),
    "seed-oss-dropout": Family("Seed-OSS with its dropout", "seed_oss"),
    "gpt2": Family("GPT-2", "gpt2"),
    "phi": Family("Phi-1 and 2", "phi"),
    "starcoder2": Family("StarCoder 2", "starcoder2"),
    "arcee": Family("Arcee AFM", "arcee"),
}


@dataclass(frozen=True)
class ExactFamily(Family):
    """One that is sparse by itself: what is found of how many layers, and the matrices of an MLP."""

    kind: type[nn.Module] = ExactDown
    matrices: int = 2
    layers: int = LAYERS


_GEMMA_3N = {
    **_SMALL_HEADS,
    "num_hidden_layers": 4,
    "activation_sparsity_pattern": [0.95, 0.7, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
}
EXACT = {
    "llama-relu": ExactFamily(
        "ReLUfied Llama (ProSparse, MiniCPM-S)", "llama", {"hidden_act": "relu"}, kind=CatsMLP, matrices=3
    ),
    "phi3-relu": ExactFamily("ReLUfied Phi-3", "phi3", {"hidden_act": "relu"}, kind=CatsMLP, matrices=3),
    "mixtral-relu": ExactFamily(
        "ReLUfied Mixtral", "mixtral", {**_EXPERTS, "hidden_act": "relu"}, kind=CatsMLP, matrices=3
    ),
    "llama-relu2": ExactFamily("Llama with squared ReLU", "llama", {"hidden_act": "relu2"}, kind=ExactMLP, matrices=3),
    "gemma3n": ExactFamily(
        "Gemma 3n, its sparse layers", "gemma3n_text", _GEMMA_3N, kind=ExactMLP, matrices=3, layers=2
    ),
    "bitnet": ExactFamily("BitNet", "bitnet", matrices=3),
    "nemotron": ExactFamily("Nemotron", "nemotron", kind=ExactMLP),
    "arcee": ExactFamily("Arcee AFM", "arcee", kind=ExactMLP),
    "jais2": ExactFamily("Jais 2", "jais2", kind=ExactMLP),
    "nanochat": ExactFamily("NanoChat", "nanochat", kind=ExactMLP),
    "persimmon": ExactFamily("Persimmon", "persimmon"),
    "opt": ExactFamily("OPT", "opt", {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN}),
    "falcon-relu": ExactFamily("ReLU-Falcon", "falcon", {"activation": "relu"}),
}


def installed(families: dict[str, Family]) -> dict[str, Family]:
    """Those that the installed transformers has."""
    return {name: family for name, family in families.items() if family.model_type in CONFIG_MAPPING}


def keeps_experts_together(model: nn.Module) -> bool:
    """Whether a layer's experts are two parameters; in early versions of transformers some families have lists."""
    return any("gate_up_proj" in key for key in model.state_dict())


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> nn.Module:
    """A random model in eval mode. Weights are wide enough for activations of order one, as in real models."""
    torch.manual_seed(seed)
    chosen = (FAMILIES | MIXTURES | REFUSED | EXACT)[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[chosen.model_type](**(_SIZES | chosen.arguments | sizes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("_proj", "fc", "dense_")) and parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            elif "_proj" in name and parameter.dim() == 1:
                parameter.normal_(0, 0.5)
    return model.to(dtype).eval()


def small_model(family: str = "llama", **sizes):
    """A tiny model whose rows are wide enough for groups."""
    return tiny_model(family, **({"hidden_size": 128, "intermediate_size": 192} | sizes))


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """``count`` random token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


class CharacterTokenizer:
    """One token per character; with ``bos`` every encoded text starts with token 1, as Llama's and Gemma's do."""

    def __init__(self, bos: bool = False) -> None:
        self.bos = bos
        self.bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        start = [self.bos_token_id] if self.bos and add_special_tokens else []
        return {"input_ids": start + [3 + ord(c) % (VOCABULARY - 3) for c in text]}
