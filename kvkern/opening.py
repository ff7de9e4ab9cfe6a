"""What is opened from outside: devices, models with their tokenizers, documents and files of questions. All refusals are here.

torch and transformers are imported when something is opened, so that a command that opens nothing answers at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kvkern.errors import CapacityError, DeviceError, KvkernError, RequestError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from kvkern.geometry import Geometry
    from kvkern.header import Header

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


# -- devices and dtypes ------------------------------------------------------------------------------------------------


def device_of(name: str | None) -> torch.device:
    """The device of that name, cuda:0 for "cuda"; if None a GPU where there is one. Raises DeviceError."""
    import torch

    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    wanted = (there[1] if len(there) > 1 else "cpu") if name is None else "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise DeviceError(
            "device", found=name, needed=f"one of {', '.join(there)}", do="leave it out, or name one of these"
        )
    return torch.device(wanted)


def dtype_for(device: torch.device) -> Dtype:
    """Where none is named: float32 on a CPU, the checkpoint's own on a GPU."""
    return "float32" if device.type == "cpu" else "auto"


def dtype_of(header: Header) -> Dtype:
    """That of a .kv file, which the model must have too."""
    dtype: Any = str(header.identity.geometry.dtype).removeprefix("torch.")
    return dtype


@contextlib.contextmanager
def room_for(what: str, device: torch.device, do: str = "free some, or use a smaller model") -> Iterator[None]:
    """A device that is full is no bug: it becomes a CapacityError."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise CapacityError("memory", found=f"no room for {what} on {device}", needed="free memory", do=do) from None


# -- models ------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What transformers is asked for: a folder, which is read without a look at the network, or a name on the hub."""

    name: str
    local: bool

    @property
    def options(self) -> dict[str, Any]:
        """Of every from_pretrained: no code of the model's own is run."""
        return {"local_files_only": self.local, "trust_remote_code": False}

    def folder(self) -> str:
        """Where its files lie; those of a name lie together, and whoever is given their folder needs no network."""
        if self.local:
            return self.name
        from transformers.utils import cached_file

        try:
            return str(Path(cached_file(self.name, "config.json")).parent)
        except Exception as error:  # whatever stands between here and the hub
            found = f"{self.name}: no such folder, and from the hub {_first_line(error)}"
            raise no_model(found, "name the folder of a checkpoint, or check the name and the network") from None


def source_of(name: str) -> Source:
    """Raises RequestError for a name that is neither a folder with a config.json nor OWNER/NAME."""
    path = Path(name).expanduser()
    if name and (path / "config.json").is_file():
        return Source(str(path.resolve()), True)
    owner, _, own = name.partition("/")
    if path.exists() or not owner or not own or "/" in own or name[0] in ".~":
        if not name:
            found = "an empty name"
        elif path.is_dir():
            found = f"{name}, a folder without config.json"
        else:
            found = f"{name}, a file" if path.exists() else f"no folder {name}"
        raise no_model(found)
    return Source(name, False)


def model_of(header: Header) -> str:
    """The model that made a .kv file, by its provenance. Raises RequestError where that is not to be found."""
    name = header.provenance.get("model")
    if not isinstance(name, str) or not name:
        raise no_model(f"none in the provenance of {header.path.name}", "name it by --model")
    try:
        source_of(name)
    except RequestError as error:
        raise no_model(f"{error.found}, which {header.path.name} names", "name it by --model") from None
    return name


def open_model(name: str, dtype: str | None, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) ready for kvkern, every weight from safetensors; dtype None: `dtype_for(device)`.

    Raises RequestError for what is no whole checkpoint of a causal language model, CapacityError where the device has no
    room for it, UnsupportedError or DeviceError for a model that the kernels cannot serve.
    """
    source = source_of(name)
    import torch
    import transformers

    from kvkern import qwen3

    _quiet()
    dtype = dtype or dtype_for(device)
    with _reading(name):
        # First, so that a name that nobody knows is asked for once.
        config = transformers.AutoConfig.from_pretrained(source.name, **source.options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.name, **source.options)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.name,
            config=config,
            attn_implementation=qwen3.NAME,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **source.options,
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise no_model(f"{name}: no tokenizer in it", "put the model's tokenizer.json there")
    for problem in ("missing", "mismatched"):
        # transformers would draw these weights at random, and say so in a warning.
        wrong = info[f"{problem}_keys"]
        if wrong:
            first = min(key if isinstance(key, str) else key[0] for key in wrong)
            found = f"{name}: {len(wrong)} {problem} weights, among them {first}"
            raise no_model(found, "copy the model again: config and weights are not of one model")
    with room_for("the weights", device):
        model = model.to(device).eval()
    qwen3.check_model(model)
    return model, tokenizer


def weigh_model(name: str, dtype: Dtype) -> tuple[Geometry, int, str]:
    """(geometry, bytes of the weights, what these are known by), without loading any. Raises as `open_model` does."""
    source = source_of(name)
    import torch
    import transformers

    from kvkern.identity import model_geometry

    _quiet()
    with _reading(name):
        config = transformers.AutoConfig.from_pretrained(source.name, **source.options)
    kind = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    try:
        geometry = model_geometry(SimpleNamespace(config=config, dtype=kind, named_parameters=lambda: ()))
    except AttributeError as error:
        raise UnsupportedError(
            "model.config",
            found=f"{config.model_type} without {error.name}",
            needed="a decoder with attention in every layer",
            do="use a causal language model",
        ) from None
    elements = _stored_elements(Path(source.name)) if source.local else None
    if elements is not None:
        return geometry, elements * kind.itemsize, "its safetensors headers"
    with _reading(name), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    elements = sum(parameter.numel() for parameter in model.parameters())
    return geometry, elements * kind.itemsize, "its config"


def _stored_elements(folder: Path) -> int | None:
    """Elements of all weights in a folder, by the headers of its safetensors files; None where it has none."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    total = 0
    with _reading(str(folder)):
        names = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        for file in sorted({folder / name for name in names}):
            if not file.is_file():
                return None
            with safe_open(file, framework="pt") as opened:
                total += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    return total


def no_model(found: str, do: str = "name such a folder, or a model that can be downloaded") -> RequestError:
    needed = (
        "a checkpoint of a causal language model: a folder with config.json, tokenizer and safetensors, or a name such as "
        "Qwen/Qwen3-4B"
    )
    return RequestError("model", found=found, needed=needed, do=do)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever a library raises for a model that it cannot read becomes one error."""
    import torch

    try:
        with room_for("the weights", torch.device("cpu")):
            yield
    except KvkernError:
        raise
    except Exception as error:
        raise no_model(f"{name}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    why = next(filter(None, lines), type(error).__name__).rstrip(".")
    return why if len(why) <= 200 else why[:197] + "..."


def _quiet() -> None:
    """No bars and remarks of the libraries between ours, from here on: what matters of them becomes an error."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


# -- texts -------------------------------------------------------------------------------------------------------------


def read_text(field: str, source: str | Path) -> str:
    """A file, or standard input for the text "-", as UTF-8, its line ends untouched. Raises RequestError naming `field`."""
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            field, found=f"{name}: {why}", needed="a text file that can be read", do="name such a file"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start:,} of {name}"
        raise RequestError(field, found=found, needed="text in UTF-8", do="convert the file to UTF-8") from None


def read_document(source: str | Path) -> str:
    """As `read_text`; also refuses a text that is empty or all blank."""
    text = read_text("document", source)
    if not text.strip():
        found = f"{source}: {len(text)} characters, all blank" if text else f"{source}: an empty file"
        raise RequestError("document", found=found, needed="a text", do="give a file that is not empty")
    return text


def read_questions(source: str | Path) -> list[str]:
    """Questions of a file, a line each: plain, a JSON text, or {"question": ...}. Raises RequestError naming the line.

    A blank line between them, or a question that is blank, is refused: whoever counts answers by line would be led astray.
    """
    lines = read_text("questions", source).rstrip().split("\n")
    name = "standard input" if source == "-" else Path(source).name
    if lines == [""]:
        raise RequestError("questions", found=f"no line in {name}", needed="at least one", do="write a question a line")
    return [_question(f"questions, line {i} of {name}", line.strip()) for i, line in enumerate(lines, start=1)]


def _question(field: str, line: str) -> str:
    """A line that begins like JSON is JSON; every other is a question as it stands."""
    value: Any = line
    if line[:1] in ("{", '"'):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
    question = value.get("question") if isinstance(value, dict) else value
    if isinstance(question, str) and question.strip():
        return question
    kind = f"an object with {sorted(value)}" if isinstance(value, dict) else "no JSON"
    found = "nothing" if isinstance(question, str) else f"{kind}: {line if len(line) <= 60 else line[:57] + '...'}"
    needed = 'a question: {"question": "..."}, a text in quotes, or a plain line'
    raise RequestError(field, found=found, needed=needed, do="write one, or take the line out")
