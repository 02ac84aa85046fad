"""NVFP4Precision in a real Trainer: layers in NVFP4, the bits of a hand-written loop, exact resume, refusals."""

from __future__ import annotations

import copy
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
from te_nvfp4_cv import calls
from tests.distributed.launch import ROOT, torchrun
from tests.helpers import same_bits, values

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

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def module() -> Module:
    torch.manual_seed(1)
    return Module()


def loader() -> DataLoader:
    return DataLoader(TensorDataset(values((64, 16, 6, 6)), torch.arange(64) % 16), batch_size=16)


def trainer(folder: Path, steps: int, plugin: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings = {"accelerator": "cpu", "devices": 1, "max_steps": steps, "enable_checkpointing": False} | quiet | options
    return lightning.Trainer(default_root_dir=folder, plugins=[plugin], **settings)


def test_steps_run_in_nvfp4_and_the_table_is_applied(tmp_path):
    told: dict[bool, list[tuple[str, bool]]] = {True: [], False: []}
    model = module()

    def observer(call: calls.Call) -> None:
        told[model.training].append((call.op, call.recipe is not None))

    with calls.observe(observer):
        trainer(tmp_path, 4, NVFP4Precision(RECIPE, root="net")).fit(model, loader(), loader())
    expected = [("conv2d", True), ("conv2d", True), ("linear", False)]
    assert told[True] == told[False] == 4 * expected


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_training_has_the_bits_of_a_loop_by_hand(tmp_path, dtype):
    model, twin = module(), module()
    torch.manual_seed(5)
    trainer(tmp_path, 3, NVFP4Precision(RECIPE, dtype=dtype, root="net")).fit(model, loader())
    nv.set_precision(twin.net, RECIPE)
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(twin.parameters(), 1e-2)
    enabled = dtype == "bf16"
    for batch in list(loader())[:3]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), nv.nvfp4_autocast(RECIPE):
            loss = twin.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.losses == twin.losses
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    plain = module()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert plain.training_step(next(iter(loader())), 0).item() != model.losses[0]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole, first, second = module(), module(), module()

    def fit(model: Module, epochs: int, seed: int, checkpoint: Path | None = None) -> None:
        torch.manual_seed(seed)
        saving = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path / f"{epochs}", save_last=True)
        options = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": [saving]}
        run = trainer(tmp_path, -1, NVFP4Precision(RECIPE, root="net"), **options)
        run.fit(model, loader(), ckpt_path=checkpoint)

    fit(whole, 2, 5)
    fit(first, 1, 5)
    saved = torch.load(tmp_path / "1" / "last.ckpt", weights_only=True)
    assert saved["NVFP4Precision"]["nvfp4"]["sr_drawn"] > 0
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


def test_recipes_by_name():
    assert NVFP4Precision("unet").recipe == nv.load_recipe("unet")


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((), {"dtype": "fp8"}, ValueError),
        (("nothing",), {}, FileNotFoundError),
        ((3,), {}, TypeError),
        ((), {"backend": "cudnn"}, ValueError),
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


@pytest.mark.parametrize(("root", "words"), [("body", "no submodule 'body'"), ("", "matches no module")])
def test_names_that_are_not_there_are_refused(tmp_path, root, words):
    with pytest.raises(ValueError, match=words), warnings.catch_warnings():
        trainer(tmp_path, 1, NVFP4Precision(RECIPE, root=root)).fit(module(), loader())


SCRIPT = """
import sys, torch
from tests import conftest
from tests.test_adapters_lightning import Module, loader, trainer, module, NVFP4Precision, RECIPE
model = module()
torch.manual_seed(5)
plugin = NVFP4Precision(RECIPE, root="net", share_amax=True)
trainer(sys.argv[1], 2, plugin, devices=2, strategy="ddp").fit(model, loader())
rank = torch.distributed.get_rank()
torch.save({"losses": model.losses, "state": model.state_dict()}, f"{sys.argv[1]}/{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_ddp_on_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = torchrun([str(script), str(tmp_path)], 2)
    assert done.returncode == 0, done.stdout[-3000:]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a["losses"] != b["losses"] and len(a["losses"]) == 2
    assert all(same_bits(a["state"][name], b["state"][name]) for name in a["state"])
