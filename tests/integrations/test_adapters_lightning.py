"""NVFP4Precision in a real Trainer: layers in NVFP4, the bits of a hand-written loop, exact resume, refusals."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import observe
from tests.distributed.launch import ROOT, torchrun
from tests.helpers import run_script, same_bits, values

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from te_nvfp4_cv.lightning import NVFP4Precision  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
RECIPE = nv.NVFP4BlockScaling(precision={"head": None}, tensor_scale="delayed")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.net.add_module("conv", nn.Conv2d(16, 32, 3, padding=1))
        self.net.add_module("relu", nn.ReLU())
        self.net.add_module("drop", nn.Dropout(0.2))
        self.net.add_module("down", nn.Conv2d(32, 32, 3, stride=2))
        self.net.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.net.add_module("flat", nn.Flatten())
        self.net.add_module("head", nn.Linear(32, 16))
        self.losses: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.loss(batch)

    def test_step(self, batch: Any, index: int) -> None:
        self.loss(batch)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def module() -> Module:
    torch.manual_seed(1)
    return Module()


def loader(shuffle: bool = False, odd: float = 1.0) -> DataLoader:
    """`odd` times larger are the images of odd number: those of rank 1 of 2."""
    images = values((64, 16, 6, 6))
    images[1::2] *= odd
    return DataLoader(TensorDataset(images, torch.arange(64) % 16), batch_size=16, shuffle=shuffle)


def trainer(folder: Path, steps: int, plugin: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings = {"accelerator": "cpu", "devices": 1, "max_steps": steps, "enable_checkpointing": False} | quiet | options
    return lightning.Trainer(default_root_dir=folder, plugins=[plugin] if plugin else None, **settings)


def test_steps_run_in_nvfp4_and_the_table_is_applied(tmp_path):
    told: dict[bool, list[tuple[str, bool]]] = {True: [], False: []}
    model = module()

    def observer(call: observe.Call) -> None:
        told[model.training].append((call.op, call.recipe is not None))

    with observe.observe(observer):
        trainer(tmp_path, 4, NVFP4Precision(RECIPE, root="net")).fit(model, loader(), loader())
    expected = [("conv2d", True), ("conv2d", True), ("linear", False)]
    assert told[True] == told[False] == 4 * expected


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_other_loops_run_in_nvfp4(tmp_path, loop):
    told: list[bool] = []

    def observer(call: observe.Call) -> None:
        told.append(call.recipe is not None)

    with observe.observe(observer):
        getattr(trainer(tmp_path, 1, NVFP4Precision(RECIPE, root="net")), loop)(module(), loader())
    assert told == 4 * [True, True, False]


def dtype_of(name: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_training_has_the_bits_of_a_loop_by_hand(tmp_path, dtype):
    model, twin = module(), module()
    plugin = NVFP4Precision(RECIPE, dtype=dtype, root="net")
    torch.manual_seed(5)
    run = trainer(tmp_path, 3, plugin)
    run.fit(model, loader())
    assert run.precision == {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[dtype]
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "fp16")
    nv.set_precision(twin.net, RECIPE)
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(twin.parameters(), 1e-2)
    enabled = dtype != "fp32"
    for batch in list(loader())[:3]:
        with torch.autocast("cpu", dtype_of(dtype), enabled=enabled), nv.nvfp4_autocast(RECIPE):
            loss = twin.training_step(batch, 0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert model.losses == twin.losses
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    plain = module()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype_of(dtype), enabled=enabled):
        assert plain.training_step(next(iter(loader())), 0).item() != model.losses[0]


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, accelerator):
    whole, first, second = module(), module(), module()

    def fit(model: Module, epochs: int, seed: int, checkpoint: Path | None = None) -> None:
        torch.manual_seed(seed)
        saving = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / f"{epochs}", save_last=True)
        options = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": [saving]}
        run = trainer(tmp_path, -1, NVFP4Precision(RECIPE, root="net"), accelerator=accelerator, **options)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            run.fit(model, loader(shuffle=True), loader(), ckpt_path=checkpoint)

    fit(whole, 2, 5)
    fit(first, 1, 5)
    saved = torch.load(tmp_path / "1" / "last.ckpt", weights_only=True)
    assert saved["NVFP4Precision"]["nvfp4"]["scales"]
    assert saved["NVFP4Precision"]["cuda" if accelerator == "gpu" else "rng"].numel() > 0
    assert accelerator == "gpu" or saved["NVFP4Precision"]["nvfp4"]["sr_drawn"] > 0
    fit(second, 2, 99, tmp_path / "1" / "last.ckpt")
    assert len(first.losses) == len(second.losses) == 4 and first.losses + second.losses == whole.losses
    assert all(same_bits(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


def test_fp16_has_a_scaler(tmp_path):
    plugin = NVFP4Precision(RECIPE, dtype="fp16", root="net")
    assert isinstance(plugin.scaler, torch.amp.GradScaler) and NVFP4Precision(RECIPE).scaler is None
    model = module()
    before = copy.deepcopy(model.state_dict())
    trainer(tmp_path, 4, plugin).fit(model, loader())
    assert plugin.state_dict()["scaler"]["scale"] > 0
    assert not same_bits(before["net.conv.weight"], model.net.conv.weight)


def test_the_device_is_that_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plugin = NVFP4Precision(RECIPE, dtype="fp16", root="net")
    kept = NVFP4Precision(RECIPE, device="cuda", root="net")
    monkeypatch.undo()
    assert plugin.device == "cuda"
    trainer(tmp_path, 1, plugin).fit(module(), loader())
    assert plugin.device == "cpu" and plugin.scaler._device == "cpu" and plugin.scaler.is_enabled()
    kept.convert_module(module())
    assert kept.device == "cuda"


def test_a_checkpoint_of_plain_bf16_starts_nvfp4_afresh(tmp_path):
    first, second = module(), module()
    run = trainer(tmp_path, -1, None, precision="bf16-mixed", max_epochs=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    trainer(tmp_path, -1, NVFP4Precision(RECIPE, root="net"), max_epochs=2).fit(
        second, loader(), ckpt_path=tmp_path / "plain.ckpt"
    )
    assert len(second.losses) == 4


def test_recipes_by_name_path_and_object(tmp_path):
    assert NVFP4Precision("unet").recipe == nv.load_recipe("unet")
    (tmp_path / "own.toml").write_text('description = "own"\n[recipe]\ndisable_rht = true\n')
    assert NVFP4Precision(tmp_path / "own.toml").recipe.disable_rht
    assert pickle.loads(pickle.dumps(NVFP4Precision(RECIPE, root="net"))).recipe == RECIPE  # ddp_spawn does so


def test_a_recipe_of_transformer_engine():
    pytest.importorskip("transformer_engine", reason="transformer-engine is not installed")
    te_recipe = pytest.importorskip("transformer_engine.common.recipe", reason="TransformerEngine does not import")
    assert NVFP4Precision(te_recipe.NVFP4BlockScaling(disable_rht=True)).recipe.disable_rht


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((), {"dtype": "fp8"}, ValueError),
        (("nothing",), {}, FileNotFoundError),
        ((3,), {}, TypeError),
        ((), {"backend": "blackwell"}, ValueError),
        ((), {"scaler": torch.amp.GradScaler("cpu")}, ValueError),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, error):
    with pytest.raises(error, match=r"(?s)got:.*needs:.*fix:"):
        NVFP4Precision(*arguments, **options)


def test_without_lightning_it_says_what_is_missing():
    gone = "import sys; sys.modules.update(dict.fromkeys(('lightning', 'pytorch_lightning')))"
    code = f"{gone}; import te_nvfp4_cv.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1 and "PyTorch Lightning is not installed" in done.stderr and "fix:" in done.stderr


def test_it_serves_the_lightning_that_is_imported():
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    code = (
        "from tests import conftest; import pytorch_lightning; from te_nvfp4_cv.lightning import NVFP4Precision; "
        "trainer = pytorch_lightning.Trainer(plugins=[NVFP4Precision()], accelerator='cpu', logger=False); "
        "assert isinstance(trainer.precision_plugin, NVFP4Precision)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("body", "no submodule 'body'.*Module with net.*fix:"),
        ("net.conv", "'head' matches no module.*fix:"),
        ("", "'head' matches no module.*fix: +root='net'$"),
    ],
)
def test_names_that_are_not_there_are_refused(tmp_path, root, words):
    with pytest.raises(ValueError, match=f"(?s){words}"), warnings.catch_warnings():
        trainer(tmp_path, 1, NVFP4Precision(RECIPE, root=root)).fit(module(), loader())


SCRIPT = """
import sys, torch
from tests import conftest
from tests.integrations.test_adapters_lightning import Module, loader, trainer, module, NVFP4Precision, RECIPE
model = module()
torch.manual_seed(5)
plugin = NVFP4Precision(RECIPE, root="net", share_amax=True)
trainer(sys.argv[1], 2, plugin, devices=2, strategy="ddp").fit(model, loader())
rank = torch.distributed.get_rank()

def fit(epochs, seed, checkpoint=None):
    resumed = module()
    torch.manual_seed(seed + rank)
    plugin = NVFP4Precision(RECIPE, root="net")
    run = trainer(sys.argv[1], -1, plugin, devices=2, strategy="ddp", max_epochs=epochs)
    run.fit(resumed, loader(odd=8.0), ckpt_path=checkpoint)
    run.save_checkpoint(f"{sys.argv[1]}/{epochs}.ckpt")
    return resumed

whole, first, second = fit(2, 5), fit(1, 5), fit(2, 99, f"{sys.argv[1]}/1.ckpt")
runs = {"model": model, "whole": whole, "first": first, "second": second}
told = {name: {"losses": run.losses, "state": run.state_dict()} for name, run in runs.items()}
torch.save(told, f"{sys.argv[1]}/{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_ddp_on_two_processes(tmp_path):
    """Ranks agree in their weights, and each goes on from its own scales and random state, though seeded apart."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = torchrun([str(script), str(tmp_path)], 2)
    assert done.returncode == 0, done.stdout[-3000:]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(a["model"]["losses"]) == 2
    for name in a:
        assert a[name]["losses"] != b[name]["losses"]
        assert all(same_bits(tensor, b[name]["state"][key]) for key, tensor in a[name]["state"].items())
    for own in (a, b):
        assert own["first"]["losses"] + own["second"]["losses"] == own["whole"]["losses"]
        assert all(same_bits(tensor, own["second"]["state"][key]) for key, tensor in own["whole"]["state"].items())
    ranks = torch.load(tmp_path / "1.ckpt", weights_only=True)["NVFP4Precision"]["ranks"]
    assert not torch.equal(ranks[0]["rng"], ranks[1]["rng"])
    used = [rank["nvfp4"]["scales"]["net.conv.weight"]["entries"][0]["used"] for rank in ranks]
    assert not torch.equal(used[0], used[1])


def test_the_example(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    monkeypatch.syspath_prepend(os.fspath(ROOT / "examples"))
    import lightning_resnet as example

    told: list[tuple[str, bool]] = []

    def observer(call: observe.Call) -> None:
        told.append((call.op, call.recipe is not None))

    def run(steps: int, name: str, *more: str) -> list[float]:
        folder = str(tmp_path / name)
        return example.main(
            ["--cpu", "--size", "16", "--epoch-steps", "2", "--steps", str(steps), "--folder", folder, *more]
        )

    with observe.observe(observer):
        whole = run(4, "whole")
    assert told.count(("linear", True)) == 0 < told.count(("linear", False))
    assert told.count(("conv2d", True)) == 19 * told.count(("conv2d", False)) > 0  # the stem has 3 channels
    assert len(whole) == 4 and whole[-1] < whole[0]
    printed = capsys.readouterr().out
    assert printed.count("step ") == 4 and "validation loss" in printed
    assert run(2, "parts") + run(4, "parts", "--resume") == whole
    assert "step    3  loss" in capsys.readouterr().out


def test_the_example_refuses_a_resume_without_a_folder(capsys):
    assert run_script(ROOT / "examples" / "lightning_resnet.py", "--cpu", "--resume") == 2
    assert "--resume needs --folder" in capsys.readouterr().err
