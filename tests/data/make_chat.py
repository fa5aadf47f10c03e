"""Writes `chat.json` and the folders in `tokenizers`: what transformers 5.23.0 with tokenizers 0.23.3 makes of the
templates in `chat` and of small tokenizers that are set up as those of seven families are.

The templates are written for this test in the formats of the families after which they are named.
"""

import json
import shutil
from pathlib import Path

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TEMPLATES = {name: (HERE / "chat" / f"{name}.jinja").read_text()
             for name in ["chatml", "gemma", "llama-3", "mistral", "phi-3", "thinking", "zephyr"]}


def talk(*texts, system=None):
    turns = [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CONVERSATIONS = {
    "question": talk("What is a fox?"),
    "two turns": talk("What is a fox?", "A red mammal.", "And a hen?", "A bird."),
    "with system": talk("What is a fox?", "A red mammal.", "And a hen?", "A bird.", system="Be brief."),
    "system, then a question": talk("What is a fox?", "A red mammal.", "And a hen?", system="  Be brief.\n"),
    "odd characters": talk("  größer 🦊\n\n<b>&amp;</b> {{ bos_token }} {% if %}", "\t'a' \"b\" \\n\n", "…"),
    "thoughts": talk("1+1?", "<think>\nTwo.\n</think>\n\n2", "2+2?", "<think>\nTwo and two.\n</think>\n\n4"),
    "two questions": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "another role": talk("a", "b") + [{"role": "tool", "content": "c"}, {"role": "user", "content": "d"}],
}

BYTES = [f"<0x{i:02X}>" for i in range(256)]


def sentencepiece(specials, add_bos):
    """BPE on bytes, as Llama 2, Mistral and Gemma have it. The specials come first."""
    vocab = {token: i for i, token in enumerate(specials + BYTES + ["▁", "a", "b", "ab"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    return finish(inner, specials, add_bos)


def byte_level(specials, add_bos):
    """BPE on bytes written as letters, as GPT-2, Llama 3 and Qwen have it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(letters + ["he"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")]))
    split = Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    return finish(inner, specials, add_bos)


def finish(inner, specials, add_bos):
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if add_bos:
        bos = add_bos
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, inner.token_to_id(bos))])
    return inner


# Template, vocabulary, tokenizer_config.json and generation_config.json; each differs in what says whether BOS goes first.
TOKENIZERS = {
    "chatml": ("chatml", byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None),
               {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>"}, ["<|im_end|>", "<|endoftext|>"]),
    "gemma": ("gemma", sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], "<bos>"),
              {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>"}, ["<eos>", "<end_of_turn>"]),
    "llama-3": ("llama-3", byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>"),
                {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, ["<|end_of_text|>", "<|eot_id|>"]),
    "mistral": ("mistral", sentencepiece(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>"),
                {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}}, ["</s>"]),
    "neox": ("zephyr", byte_level(["<|endoftext|>"], None),
             {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_prefix_space": False}, ["<|endoftext|>"]),
    "phi-3": ("phi-3", sentencepiece(["<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], None),
              {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False, "bos_token": "<s>", "eos_token": "<|endoftext|>"}, ["<|endoftext|>", "<|assistant|>", "<|end|>"]),
    "zephyr": ("zephyr", sentencepiece(["<unk>", "<s>", "</s>"], "<s>"),
               {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}, ["</s>"]),
}


def rendered(tokenizer, template, messages, prompt):
    try:
        return {"text": tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                                      add_generation_prompt=prompt)}
    except TemplateError as e:  # what the template raised
        return {"error": str(e)}


def texts():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), bos_token="<s>",
                                        eos_token="</s>")
    return [{"template": name, "conversation": talk, "add_generation_prompt": prompt,
             **rendered(tokenizer, template, messages, prompt)}
            for name, template in TEMPLATES.items() for talk, messages in CONVERSATIONS.items() for prompt in [False, True]]


def write_tokenizer(name, template, inner, config, stops):
    folder = HERE / "tokenizers" / name
    folder.mkdir(parents=True)
    dump = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(dump(json.loads(inner.to_str())))
    (folder / "tokenizer_config.json").write_text(dump({**config, "chat_template": TEMPLATES[template]}))
    (folder / "generation_config.json").write_text(dump({"eos_token_id": [inner.token_to_id(stop) for stop in stops]}))
    return folder


def ids():
    shutil.rmtree(HERE / "tokenizers", ignore_errors=True)
    found = {}
    for name, setup in TOKENIZERS.items():
        tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(name, *setup))
        found[name] = {
            "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
            "texts": [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in ["he is a fox", " größer 🦊\n", ""]],
            "conversations": [{"conversation": talk, "ids": list(tokenizer.apply_chat_template(CONVERSATIONS[talk], return_dict=False))}
                              for talk in ["two turns", "odd characters"]],
        }
    return found


made = {"conversations": CONVERSATIONS, "texts": texts(), "tokenizers": ids()}
(HERE / "chat.json").write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n")
