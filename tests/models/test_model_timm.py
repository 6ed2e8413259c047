"""timm's models: adapted to the data, with weights from a cache or a hub, or a clear refusal."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper.config import DataShape
from sweeper.config.model import Timm
from sweeper.errors import MissingExtraError, OutOfReachError, UsageError
from sweeper.models import build, parameter_count

timm = pytest.importorskip("timm", reason="the extra timm is not installed")
hub_constants = pytest.importorskip("huggingface_hub.constants", reason="it comes with timm")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

MNIST = DataShape(1, 28, 28, 10)
REPOSITORY = "timm/test_vit.r160_in1k"


def section(architecture: str = "test_vit", **fields: Any) -> Timm:
    return Timm(name="timm", architecture=architecture, **fields)


def test_channels_classes_and_input_size_are_adapted() -> None:
    model = build(section("vit_tiny_patch16_224", image_size=32), MNIST, seed=0)
    assert model.network.patch_embed.proj.weight.shape == (192, 1, 16, 16)
    assert model.network.pos_embed.shape == (1, 1 + 4, 192)
    assert model.network.head.weight.shape == (10, 192)
    resized: list[torch.Size] = []
    model.network.register_forward_pre_hook(lambda _, images: resized.append(images[0].shape))
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert resized == [torch.Size((2, 1, 32, 32))]


def test_without_an_image_size_the_images_stay_as_they_are() -> None:
    shape = DataShape(3, 32, 48, 10)
    model = build(section("vit_tiny_patch16_224"), shape, seed=0)
    assert model.network.pos_embed.shape == (1, 1 + 2 * 3, 192)


def test_the_large_vit_of_r1d_has_its_known_size() -> None:
    """86,567,656 with a thousand classes and three channels; head and stem are adapted."""
    adapted = 86_567_656 - 769 * 990 - 2 * 768 * 256
    assert parameter_count(section("vit_base_patch16_224", image_size=224), MNIST) == adapted


def test_an_image_that_patches_do_not_cover_is_refused() -> None:
    with pytest.raises(UsageError, match=r"patch of 16x16, but it is 28x28; set model.image_size"):
        build(section("vit_tiny_patch16_224"), MNIST)


def test_an_image_too_small_for_the_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match=r"logits \[2, 10\], but raised .*set model.image_size"):
        build(section("test_convnext"), MNIST)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("vit_basepatch16_224", "did you mean 'vit_base_patch16_224'"),
        ("test_vit.r16", r"weights that timm has \(test_vit.r160_in1k\), but got 'test_vit.r16'"),
    ],
)
def test_an_unknown_name_is_explained(architecture: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parameter_count(section(architecture), MNIST)


def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="timm knows of none"):
        build(section("vit_base_patch16_18x2_224", pretrained=True, image_size=224), MNIST)


def test_pretrained_weights_are_not_drawn_over() -> None:
    with pytest.raises(UsageError, match="init must be default where pretrained is true"):
        build(section(pretrained=True, init="orthogonal"), MNIST)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sweeper\[timm\]'"):
        build(section(), MNIST)


# --- where weights come from


class _Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download of one file uses."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", '"weights"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Requests are not printed."""


@contextmanager
def hub_with(files: dict[str, bytes]) -> Iterator[str]:
    handler = type("Hub", (_Hub,), {"files": files})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return tmp_path / "hub"


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", url)
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_weights_are_downloaded_once_and_fit_to_the_data(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = timm.create_model("test_vit")
    content = safetensors_torch.save(published.state_dict())
    with hub_with({f"/{REPOSITORY}/resolve/main/model.safetensors": content}) as url:
        use_hub(monkeypatch, url)
        first = build(section(pretrained=True, image_size=160), MNIST, seed=0)
    use_hub(monkeypatch, f"http://127.0.0.1:{free_port()}")
    again = build(section(pretrained=True, image_size=160), MNIST, seed=0)
    for model in (first, again):
        block = model.network.blocks[1].mlp.fc1.weight
        assert torch.equal(block, published.blocks[1].mlp.fc1.weight)
        colours = published.patch_embed.proj.weight.sum(dim=1, keepdim=True)
        torch.testing.assert_close(model.network.patch_embed.proj.weight, colours)
        assert model.network.head.weight.shape == (10, 64)
    assert torch.equal(first.network.head.weight, again.network.head.weight)


def test_a_hub_without_safetensors_serves_the_older_format(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = timm.create_model("test_vit")
    torch.save(published.state_dict(), tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    with hub_with({f"/{REPOSITORY}/resolve/main/pytorch_model.bin": content}) as url:
        use_hub(monkeypatch, url)
        model = build(section(pretrained=True, image_size=160), MNIST, seed=0)
    assert torch.equal(model.network.norm.weight, published.norm.weight)


def test_a_hub_that_refuses_names_what_was_wanted_and_where_to_put_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(OutOfReachError) as caught:
        build(section(pretrained=True, image_size=160), MNIST)
    message = str(caught.value)
    assert f"model.safetensors or pytorch_model.bin of {REPOSITORY}" in message
    assert str(cache / "models--timm--test_vit.r160_in1k") in message
    assert f"hf download {REPOSITORY}" in message


def test_a_hub_that_never_answers_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeper.models.timm._PROBE_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(OutOfReachError):
            build(section(pretrained=True, image_size=160), MNIST)
        assert time.monotonic() - start < 10


def test_a_hub_without_the_files_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_with({}) as url:
        use_hub(monkeypatch, url)
        with pytest.raises(UsageError, match="there is no such file"):
            build(section(pretrained=True, image_size=160), MNIST)


def test_weights_of_a_plain_address_are_kept_in_torchs_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = timm.create_model("test_vit")
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with hub_with({"/v1/test_vit.pth": (tmp_path / "weights.pth").read_bytes()}) as url:
        settings = timm.models.get_pretrained_cfg("test_vit")
        settings.hf_hub_id, settings.url = None, f"{url}/v1/test_vit.pth"
        monkeypatch.setattr(timm.models, "get_pretrained_cfg", lambda name: settings)
        build(section(pretrained=True, image_size=160), MNIST)
    assert (tmp_path / "torch/hub/checkpoints/test_vit.pth").exists()
    model = build(section(pretrained=True, image_size=160), MNIST)
    assert torch.equal(model.network.norm.weight, published.norm.weight)
    settings.url = f"{url}/v1/other.pth"
    with pytest.raises(OutOfReachError, match=r"other.pth\) must be in .*checkpoints/other.pth"):
        build(section(pretrained=True, image_size=160), MNIST)


def test_counting_parameters_needs_no_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, f"http://127.0.0.1:{free_port()}")
    pretrained, fresh = (section(pretrained=flag, image_size=160) for flag in (True, False))
    assert parameter_count(pretrained, MNIST) == parameter_count(fresh, MNIST)
