"""The files of a model's text side as one zip, the same bytes for the same files on every machine.

Stored, not deflated, so that no version of zlib decides the bytes; sorted, without dates, owners and modes.
Cost: a copy of the files, megabytes, once a server.
"""

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from engine.errors import NotFound

WANTED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
)
CHUNK_BYTES = 1 << 20
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say


def pack(folder: Path) -> bytes:
    """The zip. Raises NotFound for a folder without any such file."""
    files = sorted({path for pattern in WANTED for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise NotFound("tokenizer: the model's folder has none of its files any more")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            archive.writestr(zipfile.ZipInfo(path.name, EPOCH), path.read_bytes())
    return packed.getvalue()


def chunks(packed: bytes) -> Iterator[tuple[bytes, str]]:
    """(bytes, sha256 of everything with the last of them, else empty)."""
    digest = hashlib.sha256(packed).hexdigest()
    for first in range(0, len(packed), CHUNK_BYTES):
        last = first + CHUNK_BYTES >= len(packed)
        yield packed[first : first + CHUNK_BYTES], digest if last else ""
