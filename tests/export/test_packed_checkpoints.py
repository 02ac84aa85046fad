"""nv.export.save and load: the same outputs, small files, errors that change nothing."""

import copy
import errno
import json
import math
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import te_nvfp4_cv as nv
from te_nvfp4_cv import files
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.export import artifact, checkpoints, manifest
from te_nvfp4_cv.export.folding import FoldedNorm
from te_nvfp4_cv.recipe.files import parse_recipe
from tests.helpers import same_bits, values
from tests.networks import NO_2D, Net

safetensors = pytest.importorskip("safetensors.torch", reason="the extra [export]")
RECIPE = nv.NVFP4BlockScaling(name="mine", precision={"body.4": None})


def outputs(net: nn.Module, recipe: Any = RECIPE) -> Tensor:
    with torch.no_grad(), nv.nvfp4_autocast(recipe):
        return net(values((2, 3, 8, 8), seed=5))


def trained(recipe: Any = RECIPE) -> Net:
    """A net whose batch norm has seen something."""
    torch.manual_seed(0)
    net = Net()
    nv.set_precision(net, recipe)
    with nv.nvfp4_autocast(recipe):
        net(values((4, 3, 8, 8), seed=1)).square().mean().backward()
    net.get_parameter("head.weight").data += 0.01
    return net.eval()


@pytest.mark.parametrize("version", ["0.1.0", "9.0"])
def test_files_of_another_library_version_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """What decides is the version of the file format; the library's is only recorded."""
    net = trained()
    monkeypatch.setattr(checkpoints, "__version__", version)
    (file,) = nv.export.save(net, tmp_path / "net", RECIPE).files
    monkeypatch.undo()
    assert version.encode() in Path(file).read_bytes()
    assert same_bits(nv.export.load(file, Net())(values((2, 3, 8, 8), seed=5)), outputs(net))


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("recipe", [RECIPE, NO_2D], ids=["default", "1x16"])
def test_round_trip(tmp_path: Path, recipe: nv.NVFP4BlockScaling, shard_bytes: int) -> None:
    net = trained(recipe)
    saved = nv.export.save(net, tmp_path / "net", recipe, shard_bytes)
    assert (len(saved.files) == 1) == (shard_bytes == 10**9)
    assert saved.high == {"stem": "thin layer: 3 in-channels, fewer than 16 (recipe.thin_layers='high_precision')"} | (
        {"body.4": "the precision table says so"} if recipe is RECIPE else {}
    )
    for path in (tmp_path / "net", tmp_path / "net.safetensors", saved.files[0]):
        for weights in ("packed", "cached"):
            loaded = nv.export.load(path, Net(), weights=weights)
            assert same_bits(loaded(values((2, 3, 8, 8), seed=5)), outputs(net, recipe))
    with torch.device("meta"):
        empty = Net()
    assert same_bits(nv.export.load(tmp_path / "net", empty)(values((2, 3, 8, 8), seed=5)), outputs(net, recipe))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_what_is_in_the_file(tmp_path: Path) -> None:
    net = trained()
    saved = nv.export.save(net, tmp_path / "net.safetensors", RECIPE)
    tensors = safetensors.load_file(saved.files[0])
    codes = nv.export.load(saved.files[0], Net()).head
    assert tensors["head.weight"].dtype == torch.uint8 and tensors["head.weight"].shape == (16, 8)
    assert tensors["head.weight_scale"].dtype == torch.float8_e4m3fn and tensors["head.weight_scale"].shape == (16, 1)
    low, high = tensors["head.weight"] & 15, tensors["head.weight"] >> 4
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    magnitudes = torch.stack([low, high], dim=-1).flatten(1)
    real = grid[(magnitudes & 7).long()] * torch.where(magnitudes >= 8, -1.0, 1.0)
    real = real * tensors["head.weight_scale"].float().repeat_interleave(16, 1) * tensors["head.weight_scale_2"]
    torch.testing.assert_close(real, codes.weight, rtol=1e-6, atol=0)
    plain = net.state_dict()
    assert all(same_bits(tensors[name], plain[name]) for name in ("stem.weight", "body.2.running_var", "head.bias"))
    with safetensors.safe_open(saved.files[0], "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
    assert config["quant_algo"] == "NVFP4" and config["ignore"] == ["body.4", "stem"]
    manifest = artifact.read(saved.files[0]).manifest
    assert manifest is not None and manifest.layers["up"].k_order == "taps, channels padded to 16"
    assert parse_recipe(manifest.recipe) == RECIPE


def test_an_inference_model_is_saved_again(tmp_path: Path) -> None:
    net = trained()
    nv.export.save(net, tmp_path / "a", RECIPE)
    loaded = nv.export.load(tmp_path / "a", Net())
    nv.export.save(loaded, tmp_path / "b", RECIPE)
    assert same_bits(nv.export.load(tmp_path / "b", Net())(values((2, 3, 8, 8), seed=5)), outputs(net))
    a, b = (safetensors.load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("error:set_precision")  # which the user has not called
def test_what_a_recipe_left_in_high_precision_stays_so_without_it(tmp_path: Path) -> None:
    class Attending(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 32), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))

    class Around(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 32)
            self.inside = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inside(F.linear(x, self.weight, self.bias))
            return y

    table = nv.NVFP4BlockScaling(precision={"0": None, "1.self_attn": None})
    fprop = nv.NVFP4BlockScaling(high_precision_gemms=("fprop",))
    cases: list[tuple[Any, Any, Any]] = [
        (Net, RECIPE, (2, 3, 8, 8)), (Attending, table, (2, 4, 16)), (Net, fprop, (2, 3, 8, 8)),
        (Around, nv.NVFP4BlockScaling(precision={"": None, "inside": nv.NVFP4BlockScaling()}), (2, 16)),
    ]
    for make, recipe, shape in cases:
        torch.manual_seed(0)
        model, x = make().eval(), values(shape, seed=5)
        quantized = nv.export.quantize(model, [x], recipe)
        with torch.no_grad():
            expected = quantized(x)
        first = nv.export.save(quantized, tmp_path / "first")  # without the recipe
        second = nv.export.save(nv.export.load(first.files[0], make()), tmp_path / "second")
        assert first.quantized == second.quantized and (recipe is fprop) == (not first.quantized)
        for saved in (first, second):
            assert same_bits(nv.export.load(saved.files[0], make())(x), expected)


def test_a_file_of_quantized_weights_alone_loads_as_such(tmp_path: Path) -> None:
    """A layer's activations are part of what was measured before the model was saved."""
    x = values((2, 3, 8, 8), seed=5)
    model: Any = nv.export.quantize(trained(), [x], activations="high")
    model.up.set_mode(activations="nvfp4")
    file = nv.export.save(model, tmp_path / "net").files[0]
    loaded: Any = nv.export.load(file, Net())
    assert same_bits(loaded(x), model(x))
    assert loaded.up.quantize_x and not loaded.head.quantize_x
    for activations in ("nvfp4", "high"):
        loaded = nv.export.load(file, Net(), activations=activations)
        assert loaded.up.quantize_x == loaded.head.quantize_x == (activations == "nvfp4")
    again = nv.export.save(nv.export.load(file, Net()), tmp_path / "again").files[0]
    assert same_bits(nv.export.load(again, Net())(x), model(x))


def test_the_state_dict_of_an_inference_model_is_weights_only(tmp_path: Path) -> None:
    nv.export.save(trained(), tmp_path / "a", RECIPE)
    nv.export.save(Net(), tmp_path / "b", RECIPE)
    loaded = nv.export.load(tmp_path / "a", Net())
    torch.save(loaded.state_dict(), tmp_path / "state.pt")
    x = values((2, 3, 8, 8), seed=5)
    for weights in ("packed", "cached"):
        other = nv.export.load(tmp_path / "b", Net(), weights=weights)
        assert not torch.equal(other(x), loaded(x))
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same_bits(other(x), loaded(x))


def test_delayed_scales_become_static(tmp_path: Path) -> None:
    recipe = nv.NVFP4BlockScaling(tensor_scale="delayed")
    net = trained(recipe)
    nv.export.save(net, tmp_path / "a", recipe)
    loaded = nv.export.load(tmp_path / "a", Net())
    assert loaded.body[1].input_amax is not None
    assert "body.1.input_scale" in artifact.read(tmp_path / "a").tensors
    assert same_bits(loaded(values((2, 3, 8, 8), seed=5)), outputs(net, recipe))


def test_explicit_modules_shared_modules_and_a_root_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nv.NVFP4Linear(32, 32, recipe=NO_2D)
            self.b = self.a
            self.c = nn.Linear(32, 32)
            self.c.weight = nn.Parameter(self.a.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    x, net = values((3, 32)), Twice()
    with torch.no_grad(), nv.nvfp4_autocast():
        expected = net(x)
    nv.export.save(net, tmp_path / "twice")
    assert same_bits(nv.export.load(tmp_path / "twice", Twice())(x), expected)
    root = nn.Linear(32, 48)
    with torch.no_grad(), nv.nvfp4_autocast():
        expected = root(x)
    nv.export.save(root, tmp_path / "root")
    assert same_bits(nv.export.load(tmp_path / "root", nn.Linear(32, 48))(x), expected)


def test_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(128, 128, 3, bias=False) for _ in range(4)))
    saved = nv.export.save(net, tmp_path / "net")
    assert saved.weight_bytes <= 0.145 * saved.plain_bytes
    assert saved.total_bytes <= 0.15 * saved.plain_bytes
    assert saved.total_bytes == saved.files[0].stat().st_size


# ---- errors ---------------------------------------------------------------------------------------------------------


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.extra = nn.Linear(4, 4)
        del self.dropout, self.head
        self.body[4] = nn.Conv2d(32, 32, 3, stride=2, padding=1)


def test_a_model_that_does_not_fit_is_left_as_it_is(tmp_path: Path) -> None:
    nv.export.save(trained(), tmp_path / "net", RECIPE)
    other = Wider()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="not the one") as error:
        nv.export.load(tmp_path / "net", other)
    told = str(error.value)
    assert "not in the file: extra.weight, extra.bias" in told
    assert "not in the model: " in told and "head.weight" in told
    assert "up.weight: (32, 32, 2, 2), in the file (32, 16, 2, 2)" in told and "body.4.weight" in told
    assert type(other.up) is nn.ConvTranspose2d
    assert all(same_bits(before[name], value) for name, value in other.state_dict().items())
    loaded = nv.export.load(tmp_path / "net", Net())
    with pytest.raises(ValueError, match="before it was converted"):
        nv.export.load(tmp_path / "net", loaded)


def test_layers_of_another_kind_are_told(tmp_path: Path) -> None:
    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    class Tenfold(nv.NVFP4Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 10 * super().forward(input)

    own = Tenfold(16, 32, 3, padding="same")
    assert "subclass" in nv.export.save(nn.Sequential(own), tmp_path / "own").high["0"]
    nv.export.save(nn.Sequential(nn.Conv2d(16, 32, 3, padding="same")), tmp_path / "a")
    for model, told in (
        (Standardized(16, 32, 3, padding="same"), "Standardized, a subclass of torch's layer"),
        (own, "Tenfold, a subclass of torch's layer"),
        (nn.Conv2d(16, 32, 3), r"padding \[0, 0\], in the file \[1, 1\]"),
        (nn.Conv2d(16, 32, 3, padding="same", dilation=2, padding_mode="reflect"), r"dilation \[2, 2\], .*reflect"),
    ):
        net = nn.Sequential(model)
        with pytest.raises(ValueError, match=told):
            nv.export.load(tmp_path / "a", net)
        assert net[0] is model and type(model.weight) is nn.Parameter
    same = nn.Conv2d(16, 32, 3, padding=1)
    same.stride = 1
    nv.export.load(tmp_path / "a", nn.Sequential(same))


def settled(**changed: Any) -> nn.Module:
    conv = {"stride": 1, "padding": 1, "dilation": 1, "padding_mode": "zeros"}
    conv |= {key: value for key, value in changed.items() if key in conv}
    eps, groups, momentum = changed.get("eps", 1e-5), changed.get("groups", 4), changed.get("momentum", 0.1)
    up = nn.ConvTranspose2d(8, 8, 3, output_padding=changed.get("output_padding", 0), stride=2)
    norms = nn.BatchNorm2d(8, eps, momentum), nn.GroupNorm(groups, 8, changed.get("group_eps", 1e-5)), nn.LayerNorm(8)
    return nn.Sequential(nn.Conv2d(3, 8, 3, **conv), *norms, up, nn.Conv2d(32, 32, 1, groups=2)).eval()


def test_settings_that_no_tensor_shows_are_compared(tmp_path: Path) -> None:
    (file,) = nv.export.save(settled(), tmp_path / "net").files
    nv.export.load(file, settled(momentum=0.5))  # decides nothing in evaluation
    for changed, told in (
        ({"eps": 1e-3}, "1: eps 0.001, in the file 1e-05"),
        ({"group_eps": 1e-3}, "2: eps 0.001, in the file 1e-05"),
        ({"groups": 2}, "2: num_groups 2, in the file 4"),
        ({"stride": 2, "dilation": 2}, r"0: dilation \[2, 2\], in the file .*0: stride \[2, 2\], in the file \[1, 1\]"),
        ({"padding": "valid"}, r"0: padding \[0, 0\], in the file \[1, 1\]"),
        ({"padding_mode": "reflect"}, "0: padding_mode reflect, in the file zeros"),
        ({"output_padding": 1}, r"4: output_padding \[1, 1\], in the file \[0, 0\]"),
    ):
        with pytest.raises(ValueError, match=told):
            nv.export.load(file, settled(**changed))
    (file,) = nv.export.save(nn.Conv2d(8, 8, 1), tmp_path / "thin").files
    with pytest.raises(ValueError, match="groups 2, in the file 1"):
        nv.export.load(file, nn.Conv2d(16, 8, 1, groups=2))


@pytest.mark.parametrize("backend", ["triton", "cudnn", "nonsense"])
def test_a_backend_that_cannot_run_here_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    (file,) = nv.export.save(nn.Conv2d(16, 16, 3), tmp_path / "net").files
    fresh = nn.Conv2d(16, 16, 3)
    kind, told = (ValueError, "unknown backend") if backend == "nonsense" else (RuntimeError, "cannot run here")
    with pytest.raises(kind, match=told):
        nv.export.load(file, fresh, backend=backend)
    with pytest.raises(ValueError, match=r"nv\.export\.load: unknown weights"):
        nv.export.load(file, fresh, weights="unpacked")
    with pytest.raises(ValueError, match=r"nv\.export\.load: unknown activations"):
        nv.export.load(file, fresh, activations="bf16")
    for dtype in (torch.int8, torch.float8_e4m3fn, "bf16"):  # the first two would be other weights
        with pytest.raises(ValueError, match=r"nv\.export\.load: bad dtype"):
            nv.export.load(file, fresh, weights="cached", dtype=dtype)  # type: ignore[arg-type]
    assert type(fresh) is nn.Conv2d


@pytest.mark.parametrize("channels", [8, 32])
def test_groups_that_numpy_has_computed(tmp_path: Path, channels: int) -> None:
    """JSON takes no numbers of NumPy; 8 channels stay in high precision."""
    net = nn.Conv2d(channels, channels, 1, groups=numpy.int64(2))  # type: ignore[arg-type]
    (file,) = nv.export.save(net, tmp_path / "net").files
    nv.export.load(file, nn.Conv2d(channels, channels, 1, groups=2))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_a_script_module_inside(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(16, 16, 1), torch.jit.script(nn.BatchNorm2d(16)), nn.ReLU()).eval()

    net, x = build(), values((2, 16, 4, 4))
    for model in (net, nv.export.quantize(net, [x])):
        (file,) = nv.export.save(model, tmp_path / "net").files
        loaded = nv.export.load(file, build())
        with nv.nvfp4_autocast():
            assert same_bits(loaded(x), model(x))


def test_a_file_without_settings_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "settings_of", lambda module: {})
    (file,) = nv.export.save(settled(), tmp_path / "net").files
    monkeypatch.undo()
    assert b"settings" not in file.read_bytes()
    nv.export.load(file, settled(eps=1e-3))


def test_folded_norms_have_no_settings(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)).eval()
    (file,) = nv.export.save(nv.export.quantize(net, [values((2, 16, 4, 4))]), tmp_path / "net").files
    nv.export.load(file, nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16, 1e-3)))


def test_norms_that_are_folded_load_into_a_wrapped_model(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1))

    x = values((2, 16, 6, 6))
    quantized = nv.export.quantize(build(), [x])
    nv.export.save(quantized, tmp_path / "a")
    for model in (build(), nn.DataParallel(build())):
        loaded = nv.export.load(tmp_path / "a", model)
        assert same_bits(loaded(x), quantized(x))


def test_averaged_weights_load_into_the_network_and_the_other_way_round(tmp_path: Path) -> None:
    net = trained()
    averaged = AveragedModel(net).eval()
    averaged.update_parameters(net)
    expected, x = outputs(net), values((2, 3, 8, 8), seed=5)
    for name, model in (("plain", net), ("averaged", averaged), ("quantized", nv.export.quantize(averaged, [x]))):
        file = nv.export.save(model, tmp_path / name, RECIPE).files[0]
        for fresh in (Net(), AveragedModel(Net())):
            with torch.no_grad():
                assert same_bits(nv.export.load(file, fresh)(x), model(x) if name == "quantized" else expected)
        with torch.device("meta"):
            fresh = AveragedModel(Net())
        loaded = nv.export.load(file, fresh)
        assert not any(t.is_meta for t in loaded.state_dict().values()) and not loaded.n_averaged


def test_a_quantized_network_is_saved_as_part_of_another(tmp_path: Path) -> None:
    class Detector(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone, self.head = backbone, nn.Conv2d(32, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    def backbone() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU())

    x = values((2, 16, 6, 6))
    for wrap in (lambda model: model, nn.DataParallel):
        net = Detector(nv.export.quantize(wrap(backbone()), [x])).eval()
        nv.export.save(net, tmp_path / "a")
        loaded = nv.export.load(tmp_path / "a", Detector(backbone()))
        assert isinstance(loaded.backbone[1], FoldedNorm)
        assert same_bits(loaded.backbone(x), net.backbone(x))
    with pytest.raises(ValueError, match="folded into a layer outside of the model"):
        nv.export.save(nn.Sequential(loaded.backbone[1], nn.Linear(16, 16)), tmp_path / "b")


def test_shards_and_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "net.safetensors.index.json"
    link.symlink_to(tmp_path / "real" / "other.safetensors.index.json")
    saved = nv.export.save(trained(), link, RECIPE, 4000)
    assert link.is_symlink() and {file.parent for file in saved.files} == {tmp_path / "real"}
    nv.export.load(saved.files[0], Net())


def test_names_that_only_a_wrappers_part_tells_apart_are_refused(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)
            self.weight = nn.Parameter(torch.ones(16))

    with pytest.raises(ValueError, match="'weight' and 'module.weight'"):
        nv.export.save(Scaled(), tmp_path / "a")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=["complex128", "sparse", "meta"],
)
def test_tensors_that_safetensors_does_not_hold_are_named(value: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    model.register_buffer("odd", value)
    with pytest.raises(ValueError, match=r"no safetensors file does[\s\S]*'odd'[\s\S]*fix:"):
        nv.export.save(model, tmp_path / "net")
    model.odd = torch.zeros(2, dtype=torch.complex64)
    nv.export.save(model, tmp_path / "net")


def test_buffers_that_no_file_holds_are_named(tmp_path: Path) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.register_buffer("position", torch.arange(16.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + self.position)

    nv.export.save(Positions(), tmp_path / "a")
    with torch.device("meta"):
        model = Positions()
    with pytest.raises(ValueError, match="got:   position"):
        nv.export.load(tmp_path / "a", model)
    assert type(model.linear) is nn.Linear
    x = values((2, 16))
    assert same_bits(nv.export.load(tmp_path / "a", Positions())(x), nv.export.load(tmp_path / "a", Positions())(x))


def test_the_folder_cannot_be_synced_and_a_link_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EINVAL, "no fsync of folders here")

    monkeypatch.setattr(files, "_sync_folder", refuse)
    (tmp_path / "real").mkdir()
    link = tmp_path / "net.safetensors"
    link.symlink_to(tmp_path / "real" / "net.safetensors")
    nv.export.save(trained(), link, RECIPE)
    assert link.is_symlink() and (tmp_path / "real" / "net.safetensors").is_file()
    nv.export.load(link, Net())


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nv.export.save(trained(), tmp_path / "a", RECIPE)
    assert not list(tmp_path.iterdir())


def test_groups_that_differ_are_told(tmp_path: Path) -> None:
    nv.export.save(nn.Conv2d(32, 32, 1, groups=2), tmp_path / "a")
    with pytest.raises(ValueError, match=r"groups=1\), in the file conv2d \(groups=2\)"):
        nv.export.load(tmp_path / "a", nn.Conv2d(16, 32, 1))


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    net = trained()
    net.head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="'head' is not finite"):
        nv.export.save(net, tmp_path / "net", RECIPE)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard_bytes in (10**9, 4000):
        nv.export.save(trained(), tmp_path / "net", RECIPE, shard_bytes)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        other = trained()
        other.head.weight.data.mul_(2)
        written = files._write_all
        count = iter(range(100))

        def full(file: Any, content: bytes, written: Any = written, count: Any = count) -> None:
            if next(count) >= (0 if shard_bytes == 10**9 else 2):  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            written(file, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "_write_all", full)
            with pytest.raises(RuntimeError, match="could not be written"):
                nv.export.save(other, tmp_path / "net", RECIPE, shard_bytes)
        left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert left.items() >= before.items(), "the old file survives"
        assert same_bits(nv.export.load(tmp_path / "net", Net())(values((2, 3, 8, 8), seed=5)), outputs(trained()))
        nv.export.save(other, tmp_path / "net", RECIPE, shard_bytes)
        assert same_bits(nv.export.load(tmp_path / "net", Net())(values((2, 3, 8, 8), seed=5)), outputs(other))
        names = {path.name for path in tmp_path.iterdir()}
        assert len(names) == (1 if shard_bytes == 10**9 else len(before)), "no draft and no old shard is left"


def test_an_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="could not be written"):
        nv.export.save(nn.Linear(16, 16), tmp_path / "file" / "net")


def test_no_model_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="nv.export.save: not a module"):
        nv.export.save("net", tmp_path / "net")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="nv.export.load: not a module"):
        nv.export.load(tmp_path / "net", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="no such exported file"):
        nv.export.load(tmp_path / "net", Net())
    with pytest.raises(FileNotFoundError, match="a folder"):
        nv.export.load(tmp_path, Net())


def test_an_older_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest.Manifest, "version", 0)
        old = manifest.Manifest("0.0.1", "", (), {}, {}, version=0)
    metadata = {artifact.KEY: old.to_json()}
    safetensors.save_file({"x": torch.ones(1)}, tmp_path / "old.safetensors", metadata)
    with pytest.raises(ValueError, match=r"version 0 of the format, te_nvfp4_cv '0.0.1'"):
        nv.export.load(tmp_path / "old", Net())


def test_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    safetensors.save_file(Net().state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="holds no NVFP4 layer"):
        nv.export.load(tmp_path / "plain", Net())
    torch.save(Net().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"plain.pt is a checkpoint of torch.save[\s\S]*load_state_dict"):
        nv.export.load(tmp_path / "plain.pt", Net())
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(ValueError, match=r"net.onnx is an ONNX file[\s\S]*made from"):
        nv.export.load(tmp_path / "net.onnx", Net())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved = nv.export.save(trained(), tmp_path / "net", RECIPE, 4000)
    os.unlink(saved.files[2])
    with pytest.raises(ValueError, match=f"a shard is missing[\\s\\S]*{saved.files[2].name}"):
        nv.export.load(tmp_path / "net", Net())


class Versioned(nn.Module):
    """A module that upgrades its old state, and so has to know which version it gets."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.gain

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") is None:
            raise ValueError("a state without a version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_that_ask_for_the_version_of_their_state_get_it(tmp_path: Path) -> None:
    net = nn.Sequential(Versioned())
    saved = nv.export.save(net, tmp_path / "net")
    with torch.no_grad(), nv.nvfp4_autocast():
        expected = net(x := torch.randn(2, 16, 8, 8))
        assert torch.equal(nv.export.load(saved.files[0], nn.Sequential(Versioned()))(x), expected)


def test_a_models_own_way_to_load_states_is_not_asked(tmp_path: Path) -> None:
    """As that of Demucs, which knows no `assign`, and renames what it takes for a state of an older form."""

    class Old(Net):
        def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
            if "head.weight" not in state:  # it is packed
                state["head.weight"] = state.pop("head.bias")
            return super().load_state_dict(state, strict)

    torch.manual_seed(0)
    net, recipe = Old().eval(), nv.NVFP4BlockScaling()
    saved = nv.export.save(net, tmp_path / "net", recipe)
    assert "head" in saved.quantized
    for device in ("cpu", "meta"):
        with torch.device(device):
            fresh = Old()
        assert same_bits(nv.export.load(saved.files[0], fresh)(values((2, 3, 8, 8), seed=5)), outputs(net, recipe))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Linear(32, 16))
    for shard_bytes in (10**9, 5000):
        folders = [tmp_path / f"{shard_bytes}-{number}" for number in range(4)]
        contents = [
            [file.read_bytes() for file in nv.export.save(model, folder / "net", shard_bytes=shard_bytes).files]
            for folder in folders
        ]
        assert all(content == contents[0] for content in contents)


def test_threads_that_write_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    contents = [bytes([number]) * (1 << 18) for number in range(4)]
    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(lambda content: files.write_atomically(tmp_path / "file", content), contents * 10))
    assert (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class WithBuffer(nn.Linear):
    """A layer with a buffer of any kind of numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(16, 16)
        self.register_buffer("extra", torch.tensor([3], dtype=dtype))


@pytest.mark.parametrize(
    "saved, loaded", [(torch.float32, torch.int64), (torch.uint8, torch.float32), (torch.float8_e4m3fn, torch.bool)]
)
def test_numbers_of_another_kind_are_refused(tmp_path: Path, saved: torch.dtype, loaded: torch.dtype) -> None:
    nv.export.save(nn.Sequential(WithBuffer(saved)), tmp_path / "net", NO_2D)
    with pytest.raises(ValueError, match=rf"0.extra: {saved} in the file"):
        nv.export.load(tmp_path / "net", nn.Sequential(WithBuffer(loaded)))


class Renaming(nn.Module):
    """Names its norm otherwise in its state_dict, as models that keep the names of old checkpoints do."""

    def __init__(self, hook: bool = False) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        if hook:
            self.register_load_state_dict_pre_hook(lambda module, state, *rest: _rename(state, "ln.", "norm."))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return _rename(super().state_dict(*args, **kwargs), "norm.", "ln.")

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(_rename(dict(state_dict), "ln.", "norm."), *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(x))


def _rename(state: Any, old: str, new: str) -> Any:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
    return state


def test_tensors_under_names_that_torch_does_not_know_are_not_lost(tmp_path: Path) -> None:
    net, x = Renaming().eval(), values((4, 16))
    nn.init.normal_(net.norm.weight)
    saved = nv.export.save(net, tmp_path / "net")
    fresh = Renaming()
    with pytest.raises(ValueError, match=r"does not know[\s\S]*ln.weight, ln.bias"):
        nv.export.load(saved.files[0], fresh)
    assert type(fresh.head) is nn.Linear, "nothing has changed"
    with torch.no_grad(), nv.nvfp4_autocast():
        expected = net(x)
    assert same_bits(nv.export.load(saved.files[0], Renaming(hook=True))(x), expected)


def test_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError

    nv.export.save(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)), tmp_path / "net")
    with pytest.raises(ValueError, match=r"not in the file: 1._extra_state"):
        nv.export.load(tmp_path / "net", nn.Sequential(nn.LayerNorm(16), Counting(16, 16)))


@pytest.mark.parametrize("other", [{"num_heads": 4}, {"batch_first": True}, {"add_zero_attn": True}])
def test_attention_with_other_settings_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    said: dict[str, Any] = {"embed_dim": 32, "num_heads": 2}
    nv.export.save(nn.Sequential(nn.MultiheadAttention(**said)), tmp_path / "net")
    with pytest.raises(ValueError, match=next(iter(other))):
        nv.export.load(tmp_path / "net", nn.Sequential(nn.MultiheadAttention(**{**said, **other})))
    nv.export.load(tmp_path / "net", nn.Sequential(nn.MultiheadAttention(**said)))


def test_drafts_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    old, young, running, other = (
        tmp_path / f".{name}.tmp"
        for name in (f"net-00001-of-00002-0123abcd.safetensors.{gone.pid}", f"net.safetensors.{gone.pid}",
                     f"net.safetensors.{os.getppid()}", f"other.safetensors.{gone.pid}")
    )
    for draft in (old, young, running, other):
        draft.write_bytes(b"half")
        if draft is not young:
            os.utime(draft, (0, 0))
    nv.export.save(nn.Linear(16, 16), tmp_path / "net")
    assert not old.exists() and young.exists() and running.exists() and other.exists()
