"""Fetching a model from the Hugging Face hub into the local cache: only when a person asks for it.

Imported by the command line alone, and only for `--download`: everything else works without huggingface_hub.
"""

try:
    import huggingface_hub
except ImportError:
    huggingface_hub = None

from engine.errors import ConfigError

WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def download(name: str) -> str:
    """Fetches the newest revision of `org/name`; returns the folder. Raises ConfigError without the extra `hub`."""
    if huggingface_hub is None:
        raise ConfigError(
            "download: huggingface_hub is not installed; expected the extra 'hub': pip install 'serac[hub]'",
            field="download",
        )
    return huggingface_hub.snapshot_download(name, allow_patterns=list(WANTED))
