"""A model folder's text side: prompts and chats to token ids, token ids to text.

    folder/tokenizer.json          the tokenizer itself, by the `tokenizers` library
           tokenizer_config.json   special tokens by name, the chat template unless chat_template.jinja holds it
           generation_config.json  sampling defaults and EOS ids
           config.json             EOS ids, vocabulary

What a client writes is text: `<|im_end|>` in a prompt or in a message is encoded as those characters and never as
the special token of that name. (Tokens that a tokenizer adds without calling them special, such as `<think>`, are
ordinary vocabulary.) A prompt is never cut or padded, whatever tokenizer.json asks for. Immutable after loading;
every method may run in several threads. Cost: loading 0.3 s for 128k tokens, twice with a chat template; encoding
6 us a token.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders

from engine.errors import InvalidArgument, ModelError
from engine.text import files
from engine.text.chat import MARK, ChatTemplate, Message
from engine.text.detokenizer import ByteDetokenizer, ByteTable, Detokenizer, WindowDetokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json, without truncation and padding, that reads special tokens' text as text."""
    try:
        tokenizer = Tokenizer.from_buffer(files.read_bytes(path))
    except ValueError as error:
        raise ModelError(f"{path}: not a tokenizer: {str(error).rpartition('buffer: ')[2]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


class Text:
    """The tokenizer, templates and defaults of one model folder.

    folder    where it was read from
    vocab     smallest number that every token id is below
    eos_ids   every id that ends a sequence
    bos_id    the id of bos_token, None when there is none
    defaults  sampling defaults of the model, by the field names of `engine.core.request.Sampling`
    """

    def __init__(self, folder: str | Path, now: Callable[[], datetime] = datetime.now):
        """Raises ModelError, naming the file. `now` is what templates take for the date."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelError(
                f"{folder}: {'not a folder' if folder.exists() else 'missing'}; expected a model folder"
            )
        self.folder = folder
        self._path = folder / "tokenizer.json"
        self._tokenizer = load_tokenizer(self._path)
        self.vocab = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._check_vocab(folder)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        special = files.special_tokens(folder)
        self.eos_ids = files.eos_ids(folder, self._tokenizer.token_to_id, special)
        self.bos_id = self._tokenizer.token_to_id(special.get("bos_token", ""))
        self.defaults = files.defaults(folder)
        self._table = ByteTable(self._tokenizer.id_to_token) if self._is_byte_level() else None
        self._chat: ChatTemplate | None = None
        if (found := files.chat_template(folder)) is not None:
            contents = {i: added[i].content for i in sorted(self._special_ids)}
            self._chat = ChatTemplate(*found, special=special, contents=contents.values(), now=now)
            self._chat_tokenizer, self._real_id = self._marked_tokenizer({i: added[i] for i in contents})

    @property
    def has_chat(self) -> bool:
        """Whether the model brings a chat template."""
        return self._chat is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a prompt; `add_special` adds what the tokenizer's post-processor adds, such as BOS.

        Raises InvalidArgument when `text` holds a lone surrogate, which no encoding can write.
        """
        return self._encode(self._tokenizer, text, add_special, "prompt")

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, rendered by the model's chat template.

        messages  objects with a role and a content, both strings
        Raises InvalidArgument when the model has no template or the template does not take the messages.
        """
        if self._chat is None:
            raise InvalidArgument(
                "messages: this model has no chat template; expected a text prompt or token ids", field="messages"
            )
        rendered = self._chat.render(messages, add_generation_prompt)
        ids = self._encode(self._chat_tokenizer, rendered, False, "messages")
        return [self._real_id.get(i, i) for i in ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; ids without a token have none."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, token_id: int) -> bytes:
        """The bytes of one token as they stand in a text, special tokens by their name."""
        if self._table is not None:
            return self._table.of(token_id)
        return self.decode([token_id], skip_special=False).encode()

    def detokenizer(self, prompt_ids_tail: Sequence[int] = (), skip_special: bool = True) -> Detokenizer:
        """What turns the ids that follow a prompt into text as they come; the prompt's last ids are its context."""
        hidden = self._special_ids if skip_special else frozenset()
        if self._table is not None:
            return ByteDetokenizer(self._table, hidden, prompt_ids_tail)
        return WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special=False), self._tokenizer.id_to_token, hidden, prompt_ids_tail
        )

    def _encode(self, tokenizer: Tokenizer, text: str, add_special: bool, field: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"{field}: a lone surrogate at character {error.start}; expected text that UTF-8 can write"
            raise InvalidArgument(message, field=field) from error
        return list(tokenizer.encode(text, add_special_tokens=add_special).ids)

    def _is_byte_level(self) -> bool:
        return isinstance(self._tokenizer.decoder, decoders.ByteLevel)

    def _marked_tokenizer(self, special: dict[int, AddedToken]) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer whose special tokens are spelled MARK + text, and the real id of each of its marked ids."""
        tokenizer = load_tokenizer(self._path)
        tokenizer.add_tokens(
            [
                AddedToken(
                    MARK + token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for token in special.values()
            ]
        )
        real = {tokenizer.token_to_id(MARK + token.content): i for i, token in special.items()}
        return tokenizer, {marked: i for marked, i in real.items() if marked is not None}

    def _check_vocab(self, folder: Path) -> None:
        rows = files.read_json(folder / "config.json").get("vocab_size")
        if isinstance(rows, int) and self.vocab > rows:
            found = f"{self._path}: token ids reach {self.vocab - 1}"
            raise ModelError(f"{found}; expected ids below vocab_size {rows} of config.json")
