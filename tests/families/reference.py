"""Writes reference.json: what transformers and PEFT compute, in float32, of a tiny model of every decoder family.

Weights are not kept: both sides draw them from the names of their tensors (`draw`), as whole numbers of a byte times a step, so that
Q8_0 holds them exactly. What is kept of a model is what its GGUF file and its `config.json` say, and logits of a few positions.
Variants change one thing that a file may say.

    python -m venv /tmp/venv && /tmp/venv/bin/pip install -r tests/families/requirements.txt
    /tmp/venv/bin/python tests/families/reference.py
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoraConfig, MissConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft import VeraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

VOCAB, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 96, 128, 160, 4, 2, 32, 256
THETA = 10000.0
NUM_TOKENS = 40
KEPT = [0, 7, 16, 25, 39]
MASK = (1 << 64) - 1


def draw(name, count):
    """Whole numbers in -127..=127: splitmix64, seeded with the FNV-1a hash of the name."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 & MASK
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        numbers.append(((z ^ z >> 31) >> 40) % 255 - 127)
    return np.array(numbers, dtype=np.int64)


def values(name, tensor):
    if "values" in tensor:
        return np.array(tensor["values"], dtype=np.float32)
    numbers = draw(tensor.get("drawn_as", name), int(np.prod(tensor["shape"])))
    if len(tensor["shape"]) > 1 and tensor.get("blocks", True):
        # Every block of Q8_0 has a number of the greatest size, so that its scale is the step.
        numbers[::32] = np.where(numbers[::32] < 0, -127, 127)
    numbers = numbers.astype(np.float32) * np.float32(tensor["step"]) + np.float32(tensor["mean"])
    return numbers.reshape(tensor["shape"])


def step(deviation):
    return float(np.float16(deviation / 73.6))


def tokens():
    return torch.tensor([[int(n + 127) % VOCAB for n in draw("tokens", NUM_TOKENS)]])


ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
# What the parameters of all experts consist of.
EXPERTS = {"gate_up_proj": ["gate", "up"], "down_proj": ["down"]}
# Drawn so that no row that is compared is near a tie: another expert would be another model.
ROUTER_SEED = 0
GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(parameter, family):
    module, _, kind = parameter.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    layer, _, module = module.removeprefix("model.layers.").partition(".")
    parts = PARTS | (GEMMA_PARTS if family in ("gemma2", "gemma3") else {})
    return f"blk.{layer}.{parts[module]}.{kind}"


def parts_of(parameter, shape, family):
    """What a parameter consists of: names in the GGUF file and in a checkpoint, and shapes."""
    module, _, kind = parameter.rpartition(".")
    if not module.endswith(".experts"):
        return [(gguf_name(parameter, family), parameter, shape)]
    layer, names = module.split(".")[2], EXPERTS[kind]
    shape = [shape[0], shape[1] // len(names), shape[2]]
    return [(f"blk.{layer}.ffn_{name}_exps.weight", f"{module}.{{}}.{name}_proj.weight", shape) for name in names]


def deviation(name, shape):
    part = name.split(".")[-2]
    if len(shape) == 1:
        return 0.3
    if part == "token_embd":
        return 0.5
    gain = {"attn_q": 1.3, "attn_k": 1.3, "attn_qkv": 1.2, "ffn_gate_inp": 2.0}.get(part, 1.0)
    return gain / shape[-1] ** 0.5


class Model:
    """A model of transformers whose weights are those that a GGUF file would give it."""

    def __init__(self, family, config):
        self.model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        self.tensors = {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                weights = []
                for in_file, in_checkpoint, shape in parts_of(name, list(parameter.shape), family):
                    is_norm = "norm" in in_file and in_file.endswith("weight")
                    tensor = {"shape": shape, "mean": float(is_norm), "step": step(deviation(in_file, shape))}
                    if "ffn_gate_inp" in in_file:
                        tensor["drawn_as"] = f"{in_file} {ROUTER_SEED}"
                    self.tensors[in_file] = tensor | {"parameter": in_checkpoint}
                    weights.append(values(in_file, tensor))
                weight = np.concatenate(weights, axis=-2) if len(weights) > 1 else weights[0]
                if family in INTERLEAVED and in_file.endswith(("attn_q.weight", "attn_k.weight")):
                    halves = weight.reshape(-1, HEAD_DIM // 2, 2, HIDDEN).swapaxes(1, 2)
                    weight = halves.reshape(weight.shape)
                # The converter adds the 1 that these norms add to their weight.
                if family.startswith("gemma") and is_norm:
                    weight = weight - np.float32(1.0)
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(weight)))


def check_routes(model):
    """Whether every row that is compared chooses its experts with a lead, in deviations of its scores."""
    model = getattr(model, "base_model", model) if hasattr(model, "peft_config") else model
    with torch.no_grad():
        scores = torch.stack(model(tokens(), output_router_logits=True).router_logits)[:, -NUM_TOKENS:][:, KEPT]
    best, used = scores.sort(descending=True).values, model.config.num_experts_per_tok
    lead = ((best[..., used - 1] - best[..., used]) / scores.std(dim=-1)).min().item()
    assert lead > 0.02, f"a row leads by {lead}: take another ROUTER_SEED"


def logits(model):
    if getattr(model.config, "num_experts_per_tok", None):
        check_routes(model)
    with torch.no_grad():
        return model(tokens()).logits[0][-NUM_TOKENS:][KEPT].numpy()


def packed(array):
    return [float(f"{value:.6g}") for value in array.ravel()]


INTERLEAVED = ("llama", "smollm3", "granite")
EXACT_STEP = 2.0**-9


def adapter_tensor(name, shape):
    is_vector = name.endswith(("ia3_l", "lora_magnitude_vector"))
    is_plain = "lora_A" in name or name.startswith("prompt") or name.endswith(("vera_A", "vera_B"))
    is_large = "embedding" in name or is_vector or name.endswith(("lora_E", "vera_lambda_b", "vera_lambda_d"))
    scale = 1 if is_plain else 4 if is_large else 0.5
    tensor = {"shape": list(shape), "mean": float(is_vector), "step": EXACT_STEP * scale, "blocks": False}
    return tensor, torch.from_numpy(values(name, tensor))


def merge_into_experts(model, kind, rank, scale):
    """What PEFT makes of experts that are modules, as transformers 4 has them, merged into their parameters; its tensors."""
    tensors = {}
    for layer, block in enumerate(model.base_model.model.model.layers):
        experts = block.mlp.experts
        for expert in range(experts.num_experts):
            gate, up = experts.gate_up_proj.data[expert].chunk(2)
            for part, weight in (("gate", gate), ("up", up), ("down", experts.down_proj.data[expert])):
                if kind == "ia3" and part != "down":
                    continue
                path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                out_features, in_features = weight.shape
                shapes = {"lora_A.weight": [rank, in_features], "lora_B.weight": [out_features, rank]}
                shapes |= {"lora_magnitude_vector": [out_features]} if kind == "dora" else {}
                shapes = {"ia3_l": [1, in_features]} if kind == "ia3" else shapes
                drawn = {}
                for name, shape in shapes.items():
                    tensors[f"{path}.{name}"], drawn[name] = adapter_tensor(f"{path}.{name}", shape)
                if kind == "ia3":
                    weight *= drawn["ia3_l"]
                else:
                    weight += scale * drawn["lora_B.weight"] @ drawn["lora_A.weight"]
                if kind == "dora":
                    weight *= (drawn["lora_magnitude_vector"] / weight.norm(dim=1))[:, None]
    return tensors


def adapter(family, config, kind, peft_config):
    """An adapter of PEFT on a fresh model, and its logits."""
    model = get_peft_model(Model(family, config).model, peft_config).eval()
    tensors, drawn = {}, {}
    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        tensors[name], drawn[name] = adapter_tensor(name, tensor.shape)
    set_peft_model_state_dict(model, drawn)
    settings = {key: value for key, value in peft_config.to_dict().items() if value is not None}
    settings = json.loads(json.dumps(settings, default=lambda value: getattr(value, "value", None) or sorted(value)))
    if family == "qwen3moe" and kind in ("experts", "dora", "ia3"):
        tensors |= merge_into_experts(model, kind, settings.get("r"), settings.get("lora_alpha", 0) / settings.get("r", 1))
        if kind == "ia3":
            settings["feedforward_modules"] = ["down_proj"]
        settings["target_modules"] += ["down_proj"] if kind == "ia3" else ["gate_proj", "up_proj", "down_proj"]
    kept = {
        "lora": ["peft_type", "task_type", "r", "lora_alpha", "target_modules", "target_parameters"],
        # What PEFT makes of a list of the modules that transformers 4 had.
        "converted": ["peft_type", "task_type", "r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern"],
        "experts": ["peft_type", "task_type", "r", "lora_alpha", "target_modules"],
        "dora": ["peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_dora"],
        "adalora": ["peft_type", "task_type", "init_r", "lora_alpha", "target_modules", "rank_pattern"],
        "vera": ["peft_type", "task_type", "r", "target_modules"],
        "miss": ["peft_type", "task_type", "r", "mini_r", "init_weights", "target_modules"],
        "ia3": ["peft_type", "task_type", "target_modules", "feedforward_modules"],
        "rslora": ["peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_rslora", "lora_bias"],
        "head": ["peft_type", "task_type", "r", "lora_alpha", "target_modules"],
        "saved head": ["peft_type", "task_type", "r", "lora_alpha", "target_modules", "modules_to_save"],
        "prompt": ["peft_type", "task_type", "num_virtual_tokens"],
        "p-tuning": ["peft_type", "task_type", "num_virtual_tokens"],
        "prefix": ["peft_type", "task_type", "num_virtual_tokens"],
    }[kind]
    settings = {key: settings[key] for key in kept if key in settings}
    return {"kind": kind, "config": settings, "tensors": tensors, "logits": packed(logits(model))}


def adapters(family, config):
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets = attention + ([] if family == "qwen3moe" else ["gate_proj", "up_proj", "down_proj"])
    fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    targets = {"phi3": fused, "starcoder2": attention + ["c_fc", "c_proj"]}.get(family, targets)
    keys = {"phi3": ["qkv_proj", "gate_up_proj", "down_proj"], "starcoder2": ["k_proj", "v_proj", "c_proj"]}
    keys |= {"qwen3moe": ["k_proj", "v_proj"]}
    keys = keys.get(family, ["k_proj", "v_proj", "down_proj"])
    feedforward = {"phi3": ["gate_up_proj"], "starcoder2": ["c_proj"], "qwen3moe": []}.get(family, ["down_proj"])
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"] if family == "qwen3moe" else None
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets + ["embed_tokens"], target_parameters=parameters, task_type="CAUSAL_LM"
    )
    plain = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    older = LoraConfig(
        r=4, lora_alpha=8, target_modules=attention + ["gate", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    dora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=True, task_type="CAUSAL_LM")
    masks = {"model.layers.0": [True, False, True, True, False, False], "model.layers.1": [False] * 6}
    adalora = AdaLoraConfig(
        init_r=6, lora_alpha=12, total_step=1, target_modules=targets, task_type="CAUSAL_LM",
        rank_pattern={f"{layer}.self_attn.{targets[0]}.lora_E": mask for layer, mask in masks.items()},
    )
    vera = VeraConfig(r=12, target_modules=targets, task_type="CAUSAL_LM")
    miss = MissConfig(r=12, target_modules=targets, task_type="CAUSAL_LM")
    mini = MissConfig(r=12, mini_r=8, init_weights="mini", target_modules=targets[:2], task_type="CAUSAL_LM")
    ia3 = IA3Config(target_modules=keys, feedforward_modules=feedforward, task_type="CAUSAL_LM")
    rslora = LoraConfig(
        r=9, lora_alpha=6, target_modules=targets[:2], use_rslora=True, lora_bias=True, bias="none", task_type="CAUSAL_LM"
    )
    head = LoraConfig(r=4, lora_alpha=8, target_modules=targets[:1] + ["lm_head"], task_type="CAUSAL_LM")
    saved_head = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets[:1], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    # As they are loaded: what was trained is the encoder's output.
    loaded = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM", "inference_mode": True}
    prompt = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    # Of a base whose head is its embedding, PEFT adapts or saves both.
    of_head = [] if config.tie_word_embeddings else [("head", head), ("saved head", saved_head)]
    more = [("rslora", rslora), ("adalora", adalora), ("vera", vera), ("miss", miss), ("miss", mini), *of_head, ("p-tuning", PromptEncoderConfig(**loaded)), ("prefix", PrefixTuningConfig(**loaded))]
    more = [adapter(family, config, kind, peft_config) for kind, peft_config in more]
    return [
        adapter(family, config, "lora", lora),
        adapter(family, config, "dora", dora),
        adapter(family, config, "ia3", ia3),
        adapter(family, config, "prompt", prompt),
    ] + (
        [adapter(family, config, "experts", plain), adapter(family, config, "converted", older)]
        if family == "qwen3moe"
        else []
    ) + more


def rope(kind="default", theta=THETA, **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_parameters": rope(),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
KEYS = {
    "embedding_length": HIDDEN,
    "feed_forward_length": INTERMEDIATE,
    "block_count": 3,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "context_length": CONTEXT,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": THETA,
}


def llama3_factors(config):
    """What GGUF divides the frequencies by, as its converter computes it."""
    parameters = config.rope_parameters
    frequencies = parameters["rope_theta"] ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LINEAR = rope("linear", factor=4.0)
SHORT = [1.0 + 0.05 * i for i in range(HEAD_DIM // 2)]
LONG = [1.0 + 0.5 * i for i in range(HEAD_DIM // 2)]
LONG_ROPE = rope(
    "longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=64, attention_factor=1.25
)
# With a context within the original one, transformers never leaves the short factors; with this one it never has them.
ALWAYS_LONG = LONG_ROPE | {"original_max_position_embeddings": 16, "short_factor": LONG}
GEMMA2 = {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 8, "attn_logit_softcapping": 5.0}
GEMMA2 |= {"final_logit_softcapping": 3.0, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA3 = {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 8, "num_hidden_layers": 6}
GEMMA3 |= {"tie_word_embeddings": True, "rope_parameters": None}


def gemma3_rope(theta=1e6, local=1e4, **more):
    return {"full_attention": rope(theta=theta) | more, "sliding_attention": rope(theta=local)}


GEMMA3["rope_parameters"] = gemma3_rope()
GRANITE = {"embedding_multiplier": 6.0, "residual_multiplier": 0.25, "attention_multiplier": 0.1, "logits_scaling": 4.0}
GRANITE_KEYS = {"embedding_scale": 6.0, "residual_scale": 0.25, "attention.scale": 0.1, "logit_scale": 4.0}
QWEN3_MOE = {"head_dim": 64, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE |= {"moe_intermediate_size": 96, "norm_topk_prob": True}
QWEN3_MOE_KEYS = {"attention.key_length": 64, "attention.value_length": 64, "block_count": 2, "expert_count": 8}
QWEN3_MOE_KEYS |= {"expert_used_count": 2, "expert_feed_forward_length": 96}
STARCODER2 = {"use_bias": True, "norm_epsilon": 1e-5, "sliding_window": None, "tie_word_embeddings": True}

# Name, GGUF's architecture, transformers' model type, changes of the configuration and of the keys, variants: name, changes of
# the configuration, of the keys, and tensors that come with them.
FAMILIES = [
    (
        "llama",
        "llama",
        {},
        {},
        [
            ("another rope.freq_base", {"rope_parameters": rope(theta=500.0)}, {"rope.freq_base": 500.0}),
            ("another attention.layer_norm_rms_epsilon", {"rms_norm_eps": 0.5}, {"attention.layer_norm_rms_epsilon": 0.5}),
            (
                "linear rope.scaling",
                {"rope_parameters": LINEAR},
                {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            ),
            ("rope.scaling.factor without a type", {"rope_parameters": LINEAR}, {"rope.scaling.factor": 4.0}),
            ("rope.scale_linear", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
            (
                "yarn rope.scaling",
                {"rope_parameters": YARN},
                {
                    "rope.scaling.type": "yarn",
                    "rope.scaling.factor": 4.0,
                    "rope.scaling.original_context_length": 64,
                },
            ),
            ("rope_freqs.weight of Llama 3", {"rope_parameters": LLAMA3}, {}),
            ("attention.sliding_window", {"model_type": "mistral", "sliding_window": 8}, {"attention.sliding_window": 8}),
            ("a tied head", {"tie_word_embeddings": True}, {}),
        ],
    ),
    ("qwen2", "qwen2", {}, {}, []),
    (
        "qwen3",
        "qwen3",
        {"head_dim": 64},
        {"attention.key_length": 64, "attention.value_length": 64},
        [
            ("another attention.layer_norm_rms_epsilon", {"rms_norm_eps": 0.5}, {"attention.layer_norm_rms_epsilon": 0.5}),
            (
                "yarn rope.scaling",
                {"rope_parameters": YARN},
                {
                    "rope.scaling.type": "yarn",
                    "rope.scaling.factor": 4.0,
                    "rope.scaling.original_context_length": 64,
                },
            ),
        ],
    ),
    (
        "qwen3moe",
        "qwen3_moe",
        QWEN3_MOE,
        QWEN3_MOE_KEYS,
        [
            ("another expert_used_count", {"num_experts_per_tok": 3}, {"expert_used_count": 3}),
            ("expert_weights_norm", {"norm_topk_prob": False}, {"expert_weights_norm": False}),
        ],
    ),
    ("smollm3", "smollm3", {"num_hidden_layers": 4}, {"block_count": 4}, []),
    (
        "granite",
        "granite",
        GRANITE,
        GRANITE_KEYS,
        [
            ("another embedding_scale", {"embedding_multiplier": 2.0}, {"embedding_scale": 2.0}),
            ("another residual_scale", {"residual_multiplier": 0.5}, {"residual_scale": 0.5}),
            ("another attention.scale", {"attention_multiplier": 0.3}, {"attention.scale": 0.3}),
            ("another logit_scale", {"logits_scaling": 8.0}, {"logit_scale": 8.0}),
        ],
    ),
    (
        "phi3",
        "phi3",
        {"sliding_window": None},
        {},
        [
            ("attention.sliding_window", {"sliding_window": 8}, {"attention.sliding_window": 8}),
            (
                "rope.dimension_count",
                {"rope_parameters": rope(partial_rotary_factor=0.5), "partial_rotary_factor": 0.5},
                {"rope.dimension_count": HEAD_DIM // 2},
            ),
            (
                "the short factors of longrope",
                {"rope_parameters": LONG_ROPE, "max_position_embeddings": 64},
                {
                    "context_length": 64,
                    "rope.scaling.original_context_length": 64,
                    "rope.scaling.attn_factor": 1.25,
                },
            ),
            (
                "the long factors of longrope",
                {"rope_parameters": ALWAYS_LONG},
                {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.25},
            ),
        ],
    ),
    (
        "starcoder2",
        "starcoder2",
        STARCODER2,
        {"attention.layer_norm_epsilon": 1e-5},
        [
            ("another attention.layer_norm_epsilon", {"norm_epsilon": 0.5}, {"attention.layer_norm_epsilon": 0.5}),
            ("attention.sliding_window", {"sliding_window": 8}, {"attention.sliding_window": 8}),
        ],
    ),
    ("gemma", "gemma", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}, {}, []),
    (
        "gemma2",
        "gemma2",
        GEMMA2,
        {"attention.sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        [
            ("another attention.sliding_window", {"sliding_window": 4}, {"attention.sliding_window": 4}),
            ("another attn_logit_softcapping", {"attn_logit_softcapping": 1.0}, {"attn_logit_softcapping": 1.0}),
            ("another final_logit_softcapping", {"final_logit_softcapping": 1.0}, {"final_logit_softcapping": 1.0}),
            ("another attention.scale", {"query_pre_attn_scalar": 8}, {"attention.scale": 8**-0.5}),
        ],
    ),
    (
        "gemma3",
        "gemma3_text",
        GEMMA3,
        {"block_count": 6, "attention.sliding_window": 8, "rope.freq_base": 1e6},
        [
            (
                "linear rope.scaling",
                {"rope_parameters": gemma3_rope(rope_type="linear", factor=8.0)},
                {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            ),
            (
                "attention.sliding_window_pattern",
                {"sliding_window_pattern": 2},
                {"attention.sliding_window_pattern": 2},
            ),
            ("rope.freq_base_swa", {"rope_parameters": gemma3_rope(local=500.0)}, {"rope.freq_base_swa": 500.0}),
        ],
    ),
]


def config_of(model_type, *changes):
    settings = dict(COMMON)
    for change in changes:
        settings |= change
    model_type = settings.pop("model_type", model_type)
    return transformers.AutoConfig.for_model(model_type, **settings)


def saved(config):
    """As save_pretrained writes it."""
    return json.loads(config.to_json_string(use_diff=True))


def more_tensors(name, config):
    if name.startswith("rope_freqs"):
        return {"rope_freqs.weight": {"shape": [HEAD_DIM // 2], "values": llama3_factors(config)}}
    if "longrope" in name:
        factors = {"short": SHORT, "long": LONG}
        shape = [HEAD_DIM // 2]
        return {f"rope_factors_{key}.weight": {"shape": shape, "values": value} for key, value in factors.items()}
    return {}


def main():
    torch.set_num_threads(1)
    cases = []
    for family, model_type, changes, keys, variants in FAMILIES:
        config = config_of(model_type, changes)
        model = Model(family, config)
        base = KEYS | keys
        if "attention.layer_norm_epsilon" in keys:
            del base["attention.layer_norm_rms_epsilon"]
        case = {"name": family, "architecture": family, "metadata": base, "tensors": model.tensors}
        case["config"] = saved(config)
        case |= {"logits": packed(logits(model.model)), "adapters": adapters(family, config), "variants": []}
        for name, config_changes, key_changes in variants:
            config = config_of(model_type, changes, config_changes)
            model = Model(family, config)
            variant = {"name": name, "metadata": key_changes, "tensors": more_tensors(name, config)}
            variant["config"] = saved(config)
            variant["without"] = sorted(set(case["tensors"]) - set(model.tensors))
            case["variants"].append(variant | {"logits": packed(logits(model.model))})
        cases.append(case)
        print(family, len(variants), flush=True)
    reference = {"tokens": tokens()[0].tolist(), "positions": KEPT, "families": cases}
    path = Path(__file__).parent / "reference.json"
    path.write_text(json.dumps(reference, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
