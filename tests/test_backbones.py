"""Published encoders: strict loading of files in every form they come in, and embeddings that lie where their frame is."""
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio.models
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from sage_nb import backbones
from sage_nb.backbones import (ENCODERS, ImageEncoder, SpeechEncoder, VGGish, build_encoder, fit_weights, install_encoder, load_encoder,
                               read_weights, save_encoder)
from sage_nb.core import DataError, read_arrays, write_arrays
from sage_nb.encoders import VisualEncoder

torch.set_num_threads(1)
RATE = 16000


def settle(network: nn.Module, seed: int = 0) -> nn.Module:
    "Random weights and statistics that no initialisation has, of a size that keeps activations in range."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point():
                value.add_(0.02 * torch.randn(value.shape, generator=generator))
    return network.eval()


def faces(count: int = 3, side: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ir50():
    return settle(build_encoder("visual", "ir50"))


@pytest.fixture(scope="module")
def vggish():
    return settle(build_encoder("audio", "vggish"))


def tiny(norm_first: bool, **options) -> SpeechEncoder:
    "A wav2vec 2.0 model of torchaudio's, real strides, little width."
    torch.manual_seed(0)
    layers = [(16, 10, 5)] + 4 * [(16, 3, 2)] + 2 * [(16, 2, 2)]
    network = torchaudio.models.wav2vec2_model(
        "layer_norm" if norm_first else "group_norm", layers, norm_first, 32, 0.1, 16, 4, 2, 4, 0.1, 64, 0.0, 0.1, norm_first, 0.1, None)
    return SpeechEncoder(network.eval(), norm_first, **options)


# --- what a file may be

def test_a_file_is_safetensors_or_torch_wrapped_or_not(tmp_path):
    weights = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(3).half()}
    save_file(weights, tmp_path / "plain.safetensors")
    save_file(weights, tmp_path / "named_otherwise.bin")
    torch.save(weights, tmp_path / "plain.pth")
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "checkpoint.tar")
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, "optimizer": {"lr": 0.1}}, tmp_path / "parallel.pt")
    for path in tmp_path.iterdir():
        read = read_weights(path)
        assert read.keys() == weights.keys() and all(torch.equal(read[k], weights[k]) for k in weights), path.name


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_not_opened(tmp_path):
    for name, zipped in (("new.pth", True), ("old.pth", False)):
        torch.save({"a": torch.zeros(1), "b": Runs(tmp_path / "ran")}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(DataError, match=rf"{name}: holds Python objects besides tensors.*not opened; save") as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_damaged_file_is_one_sentence(tmp_path):
    weights = {"a": torch.randn(50, 50)}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    rng = np.random.default_rng(0)
    for path in [tmp_path / "a.safetensors", tmp_path / "a.pth", tmp_path / "old.pth"]:
        whole = path.read_bytes()
        for keep in (0, 1, 9, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:keep])
            with pytest.raises(DataError) as caught:
                read_weights(path)
            assert path.name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))
        for _ in range(20):  # a flipped byte is found, or only a value
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                read_weights(path)
            except DataError as error:
                assert "\n" not in str(error)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("held, words", [
    (torch.zeros(3), "holds a Tensor, not weights by name"), ([1, 2], "holds a list"), ({"a": 3}, "a is not a dense tensor"),
    ({1: torch.zeros(2)}, "1 is not a dense tensor"), ({"a": torch.eye(3).to_sparse()}, "a is not a dense tensor"),
    ({"a": torch.zeros(2, device="meta")}, "a is not a dense tensor"), ({"state_dict": {"a": {"b": torch.zeros(1)}}}, "a is not a dense tensor")])
def test_what_is_not_weights_is_named(tmp_path, held, words):
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(DataError, match=words):
        read_weights(tmp_path / "a.pth")


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(DataError, match=re.escape(f"{path}: cannot be read")):
            read_weights(path)


# --- fitting

def test_the_first_misfit_is_named_with_both_shapes(tmp_path):
    encoder = build_encoder("visual", "timm:test_vit")
    good = encoder.network.state_dict()
    name = "blocks.1.attn.qkv.weight"
    shape = re.escape(str(tuple(good[name].shape)))
    bad = {"missing": {k: v for k, v in good.items() if k != name}, "shaped": {**good, name: good[name][:5]}, "extra": {**good, "another": torch.zeros(2)}}
    words = {"missing": f"{name} is nothing, the visual encoder timm:test_vit expects {shape}",
             "shaped": rf"{name} is \(5, 64\), the visual encoder timm:test_vit expects {shape}", "extra": r"another is \(2,\).* expects nothing"}
    for case, weights in bad.items():
        save_file(weights, tmp_path / "theirs.safetensors")
        with pytest.raises(DataError, match=rf"theirs.safetensors: {words[case]}; give weights of this architecture"):
            install_encoder(tmp_path / "ours.safetensors", "visual", "timm:test_vit", tmp_path / "theirs.safetensors")
    assert not (tmp_path / "ours.safetensors").exists()
    fit_weights(encoder, good, "a file", "encoder")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused(value):
    encoder = build_encoder("visual", "timm:test_vit")
    weights = {k: v.double() for k, v in encoder.network.state_dict().items()}
    weights["norm.bias"][3] = value  # the last becomes infinite in float32
    with pytest.raises(DataError, match="norm.bias holds values that are not finite"):
        fit_weights(encoder, weights, "a file", "encoder")


def test_precision_and_the_count_of_steps_do_not_matter():
    encoder, other = (settle(build_encoder("visual", "timm:test_resnet"), seed) for seed in (0, 1))
    fit_weights(other, {k: v.double() for k, v in encoder.network.state_dict().items() if "num_batches" not in k}, "a file", "encoder")
    assert torch.equal(other(faces()), encoder(faces())) and other.network.conv1[0].weight.dtype == torch.float32


def test_a_single_number_may_be_an_array_of_one():
    "As files written by way of numpy have it, ours among them."
    module = nn.Module()
    module.gain = nn.Parameter(torch.tensor(1.0))
    fit_weights(module, {"gain": torch.tensor([3.0])}, "a file", "encoder")
    assert module.gain.shape == () and module.gain == 3
    with pytest.raises(DataError, match=r"gain is \(2,\), the encoder expects \(\)"):
        fit_weights(module, {"gain": torch.zeros(2)}, "a file", "encoder")


def test_a_name_that_is_there_twice_is_refused(ir50):
    weights = dict(ir50.network.state_dict())
    weights["backbone.input_layer.2.weight"] = weights["input_layer.2.weight"] + 1
    with pytest.raises(DataError, match=r"backbone.input_layer.2.weight is \(64,\), the encoder expects nothing"):
        fit_weights(ir50, weights, "a file", "encoder")


# --- names and options

@pytest.mark.parametrize("kind, name, options, words", [
    ("visual", "vggish", {}, "visual encoder vggish: there is none of this name; choose from small, ir50, resnet50"),
    ("audio", "timm:test_vit", {}, "choose from small, vggish, wav2vec2_base"), ("visual", "timm:test_vit", {"window": 1}, "no option window; it has none"),
    ("visual", "timm:nothing", {}, "timm:nothing: timm .* cannot build it"), ("visual", "timm:test_vit.no_such_tag", {}, "cannot build it"),
    ("visual", "timm:hf-hub:a/b", {}, "cannot build it"), ("visual", "ir50", {"side": 64}, "side is 64"), ("visual", "ir50", {"side": "40"}, "side is 40"),
    ("audio", "vggish", {"side": 40}, "no option side; it has window, centre"), ("audio", "vggish", {"window": 0.5}, "shorter than the 0.96 s"),
    ("audio", "vggish", {"window": -1}, "window is -1"), ("audio", "vggish", {"centre": 1.5}, "centre is 1.5"),
    ("audio", "vggish", {"window": "1"}, "window is 1")])
def test_a_name_or_option_that_does_not_exist_is_refused(kind, name, options, words):
    with pytest.raises(DataError, match=words):
        build_encoder(kind, name, **options)


@pytest.mark.parametrize("package, name", [("timm", "timm:test_vit"), ("torchvision.models", "resnet50")])
def test_an_absent_package_is_named(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"package {package}: cannot be imported .*pip install sage_nb\[encoders\]"):
        build_encoder("visual", name)


def test_speech_models_are_built_as_their_bundles_are():
    pipelines = torchaudio.pipelines
    for name in ENCODERS["audio"].keys() - {"small", "vggish"}:
        bundle = getattr(pipelines, name.upper())
        with torch.device("meta"):
            encoder = build_encoder("audio", name)
        assert (encoder.dim, encoder.normalise) == (bundle._params["encoder_embed_dim"], bundle._normalize_waveform), name
        assert encoder.dim == ENCODERS["audio"][name].dim and len(encoder.network.encoder.transformer.layers) == bundle._params["encoder_num_layers"]
        assert (encoder.network.feature_extractor.conv_layers[0].conv.bias is not None) == bundle._params["extractor_conv_bias"]
        assert "MIT License" in bundle.__doc__


# --- files of our own

def test_small_encoders_keep_their_file_format(tmp_path):
    encoder = settle(VisualEncoder())
    save_encoder(tmp_path / "face.safetensors", encoder)
    again = load_encoder(tmp_path / "face.safetensors", "visual")
    assert torch.equal(again(faces()), encoder(faces())) and not again.training and not any(p.requires_grad for p in again.parameters())
    arrays, meta = read_arrays(tmp_path / "face.safetensors")
    assert meta == {"encoder": "visual", "name": "small", "options": {}}
    with pytest.raises(DataError, match="holds visual encoder weights, not audio; give"):
        load_encoder(tmp_path / "face.safetensors", "audio")
    write_arrays(tmp_path / "face.safetensors", {**arrays, "head.weight": arrays["head.weight"][:1]}, meta)
    with pytest.raises(DataError, match=r"head.weight is \(1, 64\), the visual encoder small expects \(2, 64\)"):
        load_encoder(tmp_path / "face.safetensors", "visual")


@pytest.mark.parametrize("meta, words", [
    ({}, "holds no encoder weights, not visual"), ([1], "holds no encoder weights"), ({"encoder": "visual"}, "does not say which visual encoder"),
    ({"encoder": "visual", "name": 3, "options": {}}, "does not say which"), ({"encoder": "visual", "name": "small", "options": []}, "does not say which"),
    ({"encoder": "visual", "name": "large", "options": {}}, "none of this name"), ({"encoder": "visual", "name": "ir50", "options": {"a": 1}}, "no option a")])
def test_a_file_that_does_not_say_what_it_is_is_refused(tmp_path, meta, words):
    write_arrays(tmp_path / "a.safetensors", {"a": np.zeros(2)}, meta)
    with pytest.raises(DataError, match=words):
        load_encoder(tmp_path / "a.safetensors", "visual")


def test_same_weights_same_bytes(tmp_path):
    torch.save(build_encoder("visual", "timm:test_vit").network.state_dict(), tmp_path / "theirs.pth")
    for name in "ab":
        install_encoder(tmp_path / name, "visual", "timm:test_vit", tmp_path / "theirs.pth")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- faces

def published_ir50(cells: int) -> dict[str, tuple[int, ...]]:
    "Names and shapes as face.evoLVe and the lineage publish them, written down from their layout and not from ours."
    shapes = {}

    def norm(name, channels):
        shapes.update({f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})

    shapes["input_layer.0.weight"], shapes["input_layer.2.weight"] = (64, 3, 3, 3), (64,)
    norm("input_layer.1", 64)
    before = 64
    for unit, depth in enumerate([64] * 3 + [128] * 4 + [256] * 14 + [512] * 3):
        body = f"body.{unit}"
        if before != depth:
            shapes[f"{body}.shortcut_layer.0.weight"] = (depth, before, 1, 1)
            norm(f"{body}.shortcut_layer.1", depth)
        norm(f"{body}.res_layer.0", before)
        shapes |= {f"{body}.res_layer.1.weight": (depth, before, 3, 3), f"{body}.res_layer.2.weight": (depth,), f"{body}.res_layer.3.weight": (depth, depth, 3, 3)}
        norm(f"{body}.res_layer.4", depth)
        before = depth
    norm("output_layer.0", 512)
    shapes |= {"output_layer.3.weight": (512, 512 * cells * cells), "output_layer.3.bias": (512,)}
    norm("output_layer.4", 512)
    return shapes


def test_ir50_loads_the_lineages_checkpoint(tmp_path):
    "With a prefix and a classifier; without num_batches_tracked, as old ones are."
    generator = torch.Generator().manual_seed(0)
    weights = {f"backbone.{name}": torch.randn(shape, generator=generator) for name, shape in published_ir50(5).items()}
    torch.save(weights | {"logits.weight": torch.zeros(8, 512), "logits.bias": torch.zeros(8)}, tmp_path / "theirs.pth")
    install_encoder(tmp_path / "ours.safetensors", "visual", "ir50", tmp_path / "theirs.pth")
    encoder = load_encoder(tmp_path / "ours.safetensors", "visual")
    assert all(torch.equal(encoder.network.state_dict()[name.removeprefix("backbone.")], value) for name, value in weights.items())


def test_ir50_of_face_recognition_has_another_size():
    encoder = build_encoder("visual", "ir50", side=112)
    assert {k: tuple(v.shape) for k, v in encoder.network.state_dict().items() if "num_batches" not in k} == published_ir50(7)
    assert encoder.network.body(torch.zeros(1, 64, 112, 112)).shape == (1, 512, 7, 7) and (encoder.resize, encoder.crop) == ((128, 128), (112, 112))


def test_ir50_sees_the_centre_of_a_normalised_crop(monkeypatch):
    monkeypatch.setattr(backbones, "IR50", lambda side: nn.Flatten())
    encoder, crops = build_encoder("visual", "ir50"), faces(2)
    inner = crops[:, 4:44, 4:44].permute(0, 3, 1, 2) / 255
    assert torch.allclose(encoder(crops), F.normalize(((inner - 0.5) / 0.5).flatten(1)), atol=1e-6)
    edge = crops.clone()
    edge[:, :4], edge[:, 44:], edge[:, :, :4], edge[:, :, 44:] = 0, 255, 255, 0
    assert torch.equal(encoder(edge), encoder(crops)) and encoder(faces(1, 96)).shape == (1, 3 * 40 * 40)


def test_ir50_gives_unit_vectors_whatever_the_batch(ir50):
    crops = faces(2)
    together = ir50(crops)
    assert torch.allclose(together.norm(dim=1), torch.ones(2), atol=1e-6) and (together[0] - together[1]).norm() > 1e-3
    assert torch.allclose(ir50(crops[1:])[0], together[1], atol=1e-5)
    assert ir50(crops[:0]).shape == (0, 512)


def test_a_larger_crop_is_made_smaller_without_aliasing():
    encoder = ImageEncoder(nn.Identity(), 3, (48, 48), (48, 48), (0.0,) * 3, (1.0,) * 3)
    fine = 255 * (torch.arange(192) % 4 == 0).to(torch.uint8)
    seen = encoder(fine[None, None, :, None].expand(1, 192, 192, 3))
    assert (seen[..., 2:-2] - 0.25).abs().max() < 0.02  # lines of one pixel in four become dark grey everywhere


def test_resnet50_is_torchvisions_before_its_classifier(tmp_path):
    from torchvision.models import ResNet50_Weights, resnet50

    torch.manual_seed(0)
    network = resnet50().eval()
    save_file(network.state_dict(), tmp_path / "theirs.safetensors")
    install_encoder(tmp_path / "ours.safetensors", "visual", "resnet50", tmp_path / "theirs.safetensors")
    encoder = load_encoder(tmp_path / "ours.safetensors", "visual")
    crops = faces(1, 96)
    prepared = ResNet50_Weights.IMAGENET1K_V2.transforms()(crops.permute(0, 3, 1, 2))
    kept = []
    network.avgpool.register_forward_hook(lambda module, given, out: kept.append(out.flatten(1)))
    with torch.no_grad():
        network(prepared)
    apart = (encoder(crops) - kept[0]).norm() / kept[0].norm()
    assert encoder.dim == 2048 and apart < 2e-3  # torchvision rounds to whole grey levels


@pytest.mark.parametrize("model", ["test_resnet", "test_nfnet", "levit_128s", "mobilenetv3_small_050"])
def test_timm_models_by_their_own_files(tmp_path, model):
    "With a classifier of another size; the third with two heads of two layers each, the last with features wider than its trunk."
    import timm

    full = settle(timm.create_model(model, num_classes=7))
    torch.save({"state_dict": full.state_dict()}, tmp_path / "theirs.pth")
    install_encoder(tmp_path / "ours.safetensors", "visual", f"timm:{model}", tmp_path / "theirs.pth")
    encoder = load_encoder(tmp_path / "ours.safetensors", "visual")
    config = timm.data.resolve_model_data_config(full)
    side, crops = config["input_size"][1], faces(2)
    mean, std = (255 * torch.tensor(config[name]) for name in ("mean", "std"))
    whole = int(side / config["crop_pct"])
    x = F.interpolate(crops.permute(0, 3, 1, 2).float(), (whole, whole), mode=config["interpolation"], antialias=True).clamp(0, 255)
    cut = (whole - side) // 2
    x = (x[..., cut : cut + side, cut : cut + side].permute(0, 2, 3, 1) - mean) / std
    full.reset_classifier(0)
    with torch.no_grad():
        expected = full(x.permute(0, 3, 1, 2))
    assert encoder.dim == expected.shape[1] and torch.allclose(encoder(crops), expected, rtol=1e-3, atol=1e-4)
    assert encoder(crops[:0]).shape == (0, encoder.dim)


# --- voices

def burst(at: float, seconds: float = 4.0, length: float = 0.01) -> torch.Tensor:
    "Faint noise with a short tone in it."
    sound = 1e-4 * np.random.default_rng(0).standard_normal(int(seconds * RATE))
    time = np.arange(len(sound)) / RATE
    return torch.tensor(np.where((time >= at) & (time < at + length), 0.5 * np.sin(2 * np.pi * 1000 * time), sound), dtype=torch.float32)


class Patches(nn.Module):
    "In the place of VGGish's network, 128 fixed sums over each patch: every one of its samples has a say."

    def __init__(self):
        super().__init__()
        self.sums = torch.randn(96 * 64, 128, generator=torch.Generator().manual_seed(0)) / 80

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches.flatten(1) @ self.sums


@pytest.fixture
def light(monkeypatch):
    monkeypatch.setattr(backbones, "_VGG", Patches)


def changed(encoder: nn.Module, moments: np.ndarray, at: float) -> np.ndarray:
    "How much the embedding of each moment changes when a burst is put at a time."
    with_it, without = (encoder.at(sound, moments)[0] for sound in (burst(at), burst(99.0)))
    return np.linalg.norm(with_it - without, axis=1)


def log_mel_by_hand(sound: np.ndarray, steps: int) -> np.ndarray:
    "From its description: each coefficient a sum, each triangle a formula of the frequency of its bin."
    mel = lambda hertz: 1127 * np.log(1 + hertz / 700)
    width = (mel(7500) - mel(125)) / 65
    bins = np.arange(257) * RATE / 512
    out = np.zeros((steps, 64))
    wave = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    hann = np.sin(np.pi * np.arange(400) / 400) ** 2
    for step in range(steps):
        magnitude = np.abs(wave @ (hann * sound[160 * step : 160 * step + 400]))
        for band in range(64):
            peak = mel(125) + (band + 1) * width
            out[step, band] = np.log(0.01 + magnitude @ np.maximum(0, 1 - np.abs(mel(bins) - peak) / width))
    return out


def test_vggish_spectrogram_is_as_described(vggish):
    sound = np.random.default_rng(0).standard_normal(15600) * 0.1
    ours = vggish.log_mel(torch.tensor(sound, dtype=torch.float32)[None])[0]
    assert ours.shape == (96, 64) and np.abs(ours[:10].numpy() - log_mel_by_hand(sound, 10)).max() < 1e-3


def test_vggish_loads_the_ports_files(vggish):
    "torchvggish, torchaudio until 2.8, the lineage's wrapper; layers of a VGG-11 of four groups, by number."
    shapes = {0: (64, 1), 3: (128, 64), 6: (256, 128), 8: (256, 256), 11: (512, 256), 13: (512, 512)}
    published = {f"features.{layer}.{part}": ((*shape, 3, 3) if part == "weight" else shape[:1]) for layer, shape in shapes.items() for part in ("weight", "bias")}
    for layer, shape in {0: (4096, 12288), 2: (4096, 4096), 4: (128, 4096)}.items():
        published |= {f"embeddings.{layer}.weight": shape, f"embeddings.{layer}.bias": shape[:1]}
    weights = vggish.network.state_dict()
    assert {k: tuple(v.shape) for k, v in weights.items()} == published
    again = VGGish()
    for features, embeddings in (("features", "embeddings"), ("features_network", "embedding_network"), ("backbone.features", "backbone.embeddings")):
        theirs = {k.replace("features", features, 1).replace("embeddings", embeddings, 1): v for k, v in weights.items()}
        for value in again.network.parameters():
            value.data.zero_()
        fit_weights(again, theirs | {"pproc.pca_matrix": torch.zeros(128, 128), "pproc.pca_means": torch.zeros(128, 1)}, "a file", "encoder")
        assert all(torch.equal(v, again.network.state_dict()[k]) for k, v in weights.items()), features


def test_vggish_flattens_as_tensorflow_does(vggish):
    "Time, then frequency, then channel."
    patches = torch.randn(1, 96, 64, generator=torch.Generator().manual_seed(0))
    cells = vggish.network.features(patches[:, None])
    assert cells.shape == (1, 512, 6, 4)
    flat = torch.stack([cells[0, :, t, f] for t in range(6) for f in range(4)]).flatten()[None]
    with torch.no_grad():
        assert torch.allclose(vggish.network(patches), vggish.network.embeddings(flat), atol=1e-5)


@pytest.mark.parametrize("centre", [0, 0.5, 1])
def test_a_vggish_patch_lies_where_its_frame_says(light, centre):
    encoder = VGGish(centre=centre)
    begin = np.arange(0.0, 3.0, 0.04) - centre * 0.96
    change = changed(encoder, np.arange(0.0, 3.0, 0.04), 1.5)
    hears = (begin < 1.51) & (begin + 0.975 > 1.5)
    assert (change[hears] > 0).all() and (change[~hears] == 0).all() and 22 <= hears.sum() <= 26
    [exact], [whole] = encoder.at(burst(1.5), np.array([1.5]))
    start = round((1.5 - centre * 0.96) * RATE)
    expected, shifted = (encoder.network(encoder.log_mel(burst(1.5)[None, begin : begin + 15600]))[0].numpy() for begin in (start, start + 1))
    assert np.allclose(exact, expected, atol=1e-5) and not np.allclose(exact, shifted, atol=1e-3) and whole


def test_a_longer_window_is_the_mean_of_its_patches(light):
    sound, moments = burst(1.5), np.array([1.2, 2.0])
    one, two, overlapping = (VGGish(window, centre) for window, centre in ((None, 0), (1.92, 0.5), (1.5, 0)))
    assert np.allclose(two.at(sound, moments)[0], (one.at(sound, moments - 0.96)[0] + one.at(sound, moments)[0]) / 2, atol=1e-5)
    assert np.allclose(overlapping.at(sound, moments)[0], (one.at(sound, moments)[0] + one.at(sound, moments + 0.54)[0]) / 2, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(centre=0), dict(window=1.5, centre=1)])
def test_vggish_in_pieces_is_vggish_of_the_whole(light, options):
    "Pieces that begin anywhere, with the margin that it asks for."
    encoder = VGGish(**options)
    sound, moments = torch.tensor(np.random.default_rng(1).standard_normal(6 * RATE) * 0.1, dtype=torch.float32), np.arange(0.01, 6, 0.37)
    whole, ok = encoder.at(sound, moments)
    for low, high in ((0.0, 2.1), (2.1, 4.0), (4.0, 6.0)):
        first, last = max(0, int((low - encoder.margin) * RATE) - 7), int((high + encoder.margin) * RATE)
        some = (moments >= low) & (moments < high)
        piece, there = encoder.at(sound[first:last], moments[some] - first / RATE)
        assert np.abs(piece - whole[some]).max() < 1e-4 and there.all() and ok.all()


def test_vggish_does_not_depend_on_the_batch(vggish):
    sound, moments = burst(0.5), np.linspace(0, 3.9, 34)
    together, _ = vggish.at(sound, moments)
    for i in (0, 31, 32):
        assert np.allclose(vggish.at(sound, moments[i : i + 1])[0][0], together[i], atol=1e-5)


@pytest.mark.parametrize("make", [lambda: VGGish().eval(), lambda: tiny(True), lambda: tiny(False, window=0.5)], ids=["vggish", "speech", "window"])
def test_where_there_is_no_sound(light, make):
    encoder = make()
    moments = np.array([-0.5, -0.02, 0.0, 0.005, 0.0125, 0.03, 0.1])
    for samples, there in ((0, [0] * 7), (200, [0, 0, 1, 1, 1, 0, 0]), (3200, [0, 0, 1, 1, 1, 1, 1])):  # shorter than a window, all of them
        embeddings, ok = encoder.at(0.1 * torch.ones(samples), moments)
        assert ok.tolist() == [bool(t) for t in there] and embeddings.shape == (len(moments), encoder.dim) and embeddings.dtype == np.float32
        assert (embeddings[~ok] == 0).all() and np.isfinite(embeddings).all() and (np.abs(embeddings[ok]).sum(1) > 0).all()
    none, ok = encoder.at(torch.zeros(RATE), np.zeros(0))
    assert none.shape == (0, encoder.dim) and ok.shape == (0,) and ok.dtype == bool


@pytest.mark.parametrize("norm_first", [True, False])
def test_speech_embeddings_are_torchaudios(norm_first):
    "The network's output, or a block's; the waveform normalised where it should be; taken at the middle of the 25 ms that they come from."
    sound = 0.3 * burst(0.7) + 0.1
    given = F.layer_norm(sound, sound.shape)[None] if norm_first else sound[None]
    last, first = tiny(norm_first), tiny(norm_first, layer=1)
    with torch.no_grad():
        output, blocks = last.network(given)[0][0].numpy(), last.network.extract_features(given)[0]
    centres = 0.0125 + 0.02 * np.arange(len(output))
    assert len(output) == (len(sound) - 400) // 320 + 1
    for shift in (-0.0099, 0.0, 0.0099):
        assert np.allclose(last.at(sound, centres + shift)[0], output, atol=1e-5)
        assert np.allclose(first.at(sound, centres + shift)[0], blocks[0][0], atol=1e-5)
    for layer in (0, 3, "1"):
        with pytest.raises(DataError, match=f"layer is {layer}; this one has blocks 1 to 2"):
            tiny(norm_first, layer=layer)
    assert not np.allclose(last.at(sound, centres + 0.0101)[0][:-1], output[:-1], atol=1e-3)


@pytest.mark.parametrize("centre", [0, 0.5, 1])
def test_a_speech_window_lies_where_its_frame_says(centre):
    "All embeddings hear of a burst, the nearest ones by far the most."
    moments = np.arange(0.5, 3.5, 0.1)
    encoder = tiny(False, window=0.2, centre=centre, layer=1)
    begin = moments - centre * 0.2
    burst_at = 2.005
    change = changed(encoder, moments, burst_at)
    holds = (begin < burst_at) & (begin + 0.2 > burst_at + 0.01)
    assert holds.sum() == 2 and set(np.argsort(-change)[:2]) == set(np.flatnonzero(holds)), (change.round(2), holds)
    every, _ = tiny(False, layer=1).at(burst(burst_at), 0.0125 + 0.02 * np.arange(199))
    inside = (centres := 0.0125 + 0.02 * np.arange(199)) >= begin[7] - 1e-9
    inside &= centres < begin[7] + 0.2 - 1e-9
    assert inside.sum() == 10 and np.allclose(encoder.at(burst(burst_at), moments[7:8])[0][0], every[inside].mean(0), atol=1e-5)


@pytest.mark.parametrize("centre", [0, 0.5, 1])
def test_a_speech_window_without_an_embedding_takes_the_one_nearest_to_its_middle(centre):
    encoder, nearest = tiny(False, window=0.016, centre=centre), tiny(False)
    moments = np.arange(0.5, 0.6, 0.003)
    assert np.allclose(encoder.at(burst(0.5), moments)[0], nearest.at(burst(0.5), moments + (0.5 - centre) * 0.016)[0], atol=1e-6)


def test_the_nearest_speech_embedding_is_the_bursts():
    moments = np.arange(0.5, 3.5, 1 / 30)
    change = changed(tiny(False, layer=1), moments, 2.0)
    assert abs(moments[change.argmax()] - 2.005) < 0.02


def test_a_bundles_file_in_its_older_names_with_letters_on_top(tmp_path):
    "HuBERT base at its real size, named as before torch's parametrisations, from a fine-tuned bundle, as torch.save writes it."
    torch.manual_seed(0)
    network = torchaudio.models.hubert_base(aux_num_out=29).eval()
    old = {"original0": "weight_g", "original1": "weight_v"}
    weights = {re.sub(r"parametrizations\.weight\.(original\d)", lambda m: old[m[1]], k): v for k, v in network.state_dict().items()}
    assert "encoder.transformer.pos_conv_embed.conv.weight_g" in weights and "aux.weight" in weights
    torch.save(weights, tmp_path / "theirs.pth")
    install_encoder(tmp_path / "ours.safetensors", "audio", "HUBERT_BASE", tmp_path / "theirs.pth", layer=2, centre=1)
    encoder = load_encoder(tmp_path / "ours.safetensors", "audio")
    assert (encoder.layer, encoder.window, encoder.centre) == (2, None, 1)
    sound = burst(0.5, 1.0)
    with torch.no_grad():
        expected = network.extract_features(sound[None], num_layers=2)[0][-1][0].numpy()
    embeddings, ok = encoder.at(sound, 0.0125 + 0.02 * np.arange(49))
    assert ok.all() and encoder.dim == 768 and np.allclose(embeddings, expected, atol=1e-5)
