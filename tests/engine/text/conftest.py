"""Small model folders, made on the spot: a byte-level tokenizer and one with byte fallback, as Llama 2 has."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SAMPLE = ["def f(x):\n    return x + 1\n", "Grüße aus Köln, 你好 🙂\n", "the quick brown fox"] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """Byte-level BPE; `<|bos|>` is put in front by its post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Characters with a space mark; what is not in the vocabulary is written as byte tokens."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<unk>", "<s>", "</s>", *byte_tokens, "▁", "a", "b", "é", "▁a", "▁▁", "\ufffd"]
    model = models.BPE(
        {word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    return {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory, tokenizers) -> Callable[..., Path]:
    """Writes a model folder: its kind of tokenizer, the content of tokenizer_config.json and of other files."""

    def make(kind: str = "byte_level", config: dict | None = None, **files: dict | str) -> Path:
        folder = tmp_path_factory.mktemp("model")
        tokenizers[kind].save(str(folder / "tokenizer.json"))
        names = {"bos_token": "<|bos|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML}
        (folder / "tokenizer_config.json").write_text(json.dumps(names if config is None else config))
        for name, content in files.items():
            suffix = ".jinja" if name == "chat_template" else ".json"
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}{suffix}").write_text(text)
        return folder

    return make
