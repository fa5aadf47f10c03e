"""Makes tests/data/bnb: tiny Llama models of random weights, quantized by bitsandbytes and saved by transformers, and the
logits of the same model with those weights decoded. Needs torch, transformers and bitsandbytes.

python tests/data/make_bnb.py
"""

import pathlib
import shutil
import tempfile

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

ROOT = pathlib.Path(__file__).parent / "bnb"
IDS = [5, 17, 3, 99, 41, 8, 250, 7, 1]
SETTINGS = {
    "nf4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
    # Some modules left whole, as Unsloth's dynamic 4-bit models have it.
    "nf4-skip": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[
        "lm_head", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj",
    ]),
}


def decoded(module):
    if hasattr(module.weight, "quant_state") and module.weight.quant_state is not None:
        module.weight.quant_state.dtype = torch.float32  # unrounded
        return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if module.weight.dtype == torch.int8:
        scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        return module.weight.data.float() * scales[:, None].float() / 127
    return module.weight.data.float()


torch.manual_seed(3)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1,
)
whole = LlamaForCausalLM(config).to(torch.bfloat16)
for name, settings in SETTINGS.items():
    out = ROOT / name
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(out)
    plain = LlamaForCausalLM(config)
    with torch.no_grad():
        weights = dict(model.named_modules())
        for key, module in plain.named_modules():
            if hasattr(module, "weight"):
                module.weight.copy_(decoded(weights[key]))
        logits = plain.eval()(torch.tensor([IDS])).logits[0]
    save_file({"logits": logits.contiguous()}, out / "logits.safetensors")
    print(name, sorted(load_file(out / "model.safetensors"))[:8], sum(f.stat().st_size for f in out.iterdir()))
