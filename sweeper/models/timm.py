"""Any model of timm by name (report R1d).

Channels, classes and, where the architecture is bound to one, the input size are adapted to the
data. Pretrained weights come from the Hugging Face cache or, once, from the network.

Shapes: B batch, C channels, H and W height and width of the image.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper.config.data import DataShape
from sweeper.config.model import Timm as TimmConfig
from sweeper.errors import MissingExtraError, OutOfReachError, UsageError
from sweeper.study.suggest import did_you_mean

_PROBE_TIMEOUT_S = 10.0
"""How long the server of pretrained weights may take to answer at all."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class Timm(nn.Module):
    """A timm network, with the images resized before it if asked for: x_BCHW -> logits."""

    def __init__(self, network: nn.Module, image_size: int | None) -> None:
        super().__init__()
        self.image_size = image_size
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.image_size is not None:
            side = self.image_size
            x_BCHW = functional.interpolate(x_BCHW, (side, side), mode="bilinear", antialias=True)
        logits: Tensor = self.network(x_BCHW)
        return logits


def timm_model(config: TimmConfig, shape: DataShape) -> nn.Module:
    """Build ``config.architecture`` for images of ``shape``.

    On the meta device no weights are loaded. Raises MissingExtraError without timm, UsageError for
    an architecture or weights that do not exist, and OutOfReachError where weights are not in the
    cache and their server does not answer.
    """
    timm = _import_timm()
    name = config.architecture
    settings = _settings(timm, name)
    arguments: dict[str, Any] = {"in_chans": shape.channels, "num_classes": shape.classes}
    if settings.get("fixed_input_size"):
        side = config.image_size
        arguments["img_size"] = (side, side) if side else (shape.height, shape.width)
    if config.pretrained and torch.get_default_device().type != "meta":
        arguments |= _weights(name, settings)
    try:
        network = timm.create_model(name, **arguments)
    except Exception as error:
        raise UsageError(
            f"timm could not build {name} for {shape.channels}x{shape.height}x{shape.width} "
            f"images and {shape.classes} classes with image_size={config.image_size}: "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_patches(network, config, shape)
    return Timm(network, config.image_size)


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(
            "model.name timm needs the package timm, which is not installed; "
            "install it with: pip install 'sweeper[timm]'"
        ) from error
    return timm


def _settings(timm: ModuleType, name: str) -> Mapping[str, Any]:
    """What timm knows of an architecture: input size, where its weights are.

    Raises UsageError for a name that timm does not have.
    """
    if not timm.is_model(name):
        raise UsageError(
            f"model.architecture must be a model of timm {timm.__version__}, but got {name!r}"
            + did_you_mean(name, timm.list_models())
        )
    try:
        settings = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot names no set of weights
        architecture = name.partition(".")[0]
        tags = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True))
        raise UsageError(
            f"model.architecture must end in a set of weights that timm has ({tags or 'none'}), "
            f"but got {name!r}"
        ) from error
    return {} if settings is None else settings.to_dict()


def _check_patches(network: nn.Module, config: TimmConfig, shape: DataShape) -> None:
    """Raise UsageError where cutting patches would drop the right and lower edge unsaid."""
    embedding = getattr(network, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if not isinstance(patch, tuple) or getattr(embedding, "dynamic_img_pad", False):
        return
    side = config.image_size
    size = (side, side) if side else (shape.height, shape.width)
    if size[0] % patch[0] or size[1] % patch[1]:
        raise UsageError(
            f"the image size must be a multiple of {config.architecture}'s patch of "
            f"{patch[0]}x{patch[1]}, but it is {size[0]}x{size[1]}; "
            f"set model.image_size to such a multiple, for example {14 * patch[0]}"
        )


def _weights(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that load pretrained weights.

    The file is found first and handed over by its path: one in the cache costs no request, and a
    server that does not answer is noticed within seconds, where timm itself retries for minutes.
    """
    repository, url = settings.get("hf_hub_id"), settings.get("url")
    custom_load = settings.get("custom_load", False)
    if repository:
        named = settings.get("hf_hub_filename")
        path = _hub_file(name, repository, (named,) if named else _HUB_FILES)
        custom_load = custom_load == "hf"  # timm heeds anything else for other sources only
    elif url:
        path = _url_file(name, url)
    else:
        raise UsageError(
            f"{name} must have pretrained weights where model.pretrained is true, but timm knows "
            "of none; set it to false, or choose an architecture of timm.list_pretrained()"
        )
    overlay = {"file": str(path), "custom_load": custom_load}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _hub_file(name: str, repository: str, filenames: Sequence[str]) -> Path:
    """The first of ``filenames`` in the Hugging Face cache, or else downloaded into it.

    Raises UsageError where the hub refuses or lacks them, OutOfReachError where it does not answer.
    """
    import huggingface_hub as hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repo_id, _, tag = repository.partition("@")
    revision = tag or None
    for filename in filenames:
        cached = hub.try_to_load_from_cache(repo_id, filename, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    folder = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    wanted = f"the pretrained weights of {name} ({' or '.join(filenames)} of {repo_id})"
    for filename in filenames:
        url = hub.hf_hub_url(repo_id, filename, revision=revision)
        try:
            hub.get_hf_file_metadata(url, timeout=_PROBE_TIMEOUT_S)
            return Path(hub.hf_hub_download(repo_id, filename, revision=revision))
        except RepositoryNotFoundError as error:
            raise UsageError(
                f"{wanted} must be open to this machine, but the hub refuses them: {error}; "
                "log in with: hf auth login"
            ) from error
        except LocalEntryNotFoundError as error:  # the hub went away meanwhile
            raise _out_of_reach(wanted, folder, f"hf download {repo_id}", error) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # of requests or of httpx, by the hub's version
            raise _out_of_reach(wanted, folder, f"hf download {repo_id}", error) from error
    raise UsageError(f"{wanted} must be on the hub, but there is no such file")


def _url_file(name: str, url: str) -> Path:
    """The file of ``url`` in torch's cache, or else downloaded into it.

    Raises OutOfReachError where its server does not answer.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if path.exists():
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(url, timeout=_PROBE_TIMEOUT_S) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        wanted = f"the pretrained weights of {name} ({path.name})"
        raise _out_of_reach(wanted, path, f"curl -O {url}", error) from error
    return path


def _out_of_reach(wanted: str, place: Path, command: str, error: Exception) -> OutOfReachError:
    return OutOfReachError(
        f"{wanted} must be in {place}, or their server must answer, but it does not "
        f"({type(error).__name__}: {error}); "
        f"get them on a machine with a network ({command}) and copy them to that place"
    )
