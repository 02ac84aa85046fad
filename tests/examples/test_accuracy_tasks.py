"""The accuracy study's data readers, its augmentation, and its networks with the recipes that are meant for them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

import te_nvfp4_cv as nv
from tests.examples.unet_coco_data import write_cifar, write_masks

from accuracy import cifar  # noqa: E402  isort: skip
from accuracy.nets import mobilenet, resnet  # noqa: E402  isort: skip
from accuracy.tasks import BLOCKS, TASKS, Segmentation, Size, open_task, variants_of  # noqa: E402  isort: skip
from unet_coco.data import load_data  # noqa: E402  isort: skip
from unet_coco.losses import IGNORE  # noqa: E402  isort: skip
from unet_coco.unet import UNet  # noqa: E402  isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_binary_version_is_read(tmp_path):
    rows = write_cifar(tmp_path)
    train, test = cifar.load_cifar(tmp_path, train_count=50, test_count=7)
    assert train.images.shape == (50, 3, 32, 32) and test.images.shape == (7, 3, 32, 32)
    assert train.images[3].flatten().tolist() == rows[3, 1:].tolist() and int(train.labels[3]) == rows[3, 0]


def test_jpegs_in_an_npz_are_read(tmp_path):
    content = []
    for value in (10, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (value, value, value)).save(buffer, format="jpeg", quality=95)
        content.append(buffer.getvalue())
    header = 0
    while all(c[header] == content[0][header] for c in content):
        header += 1
    bodies = [np.frombuffer(c[header:-2], np.uint8) for c in content]
    offsets = np.cumsum([0, *map(len, bodies)]).astype(np.uint32)
    arrays = {"jpeg_header": np.frombuffer(content[0][:header], np.uint8)}
    for split in ("train", "test"):
        arrays |= {f"{split}_data": np.concatenate(bodies), f"{split}_offsets": offsets}
        arrays[f"{split}_labels"] = np.array([3, 4], np.uint8)
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    train, test = cifar.load_cifar(tmp_path, test_count=1)
    assert train.labels.tolist() == [3, 4] and test.labels.tolist() == [3]
    assert [int(image.float().mean().round()) for image in train.images] == [10, 200]


def test_bad_cifar_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="binary version"):
        cifar.load_cifar(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"data_batch_2.bin is damaged"):
        cifar.load_cifar(tmp_path)


def test_augmented_images_are_crops_of_the_padded_ones():
    images = torch.arange(2 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(2, 3, 32, 32) + 1
    out = cifar.augment(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for image, made in zip(padded, out, strict=True):
        crops = [image[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(made, c) or torch.equal(made, c.flip(-1)) for c in crops)


@pytest.mark.parametrize(
    "net", [resnet(16, 3, 3), resnet(16, 2), mobilenet(16)], ids=["resnet20", "resnet18", "mobilenet"]
)
def test_networks_run_and_their_presets_apply(net):
    recipe = nv.load_recipe("resnet")
    nv.set_precision(net, recipe)
    report = nv.coverage(net, torch.randn(16, 3, 32, 32), recipe=recipe)
    high = {row.name: row.reason for row in report.rows if not row.nvfp4}
    assert {"stem.0", "fc"} <= set(high)
    assert all("depthwise" in reason for name, reason in high.items() if name not in ("stem.0", "fc"))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_shapes_and_camvid_are_opened(tmp_path, monkeypatch):
    size = Size({"scale": 0.25}, 4, 1, 1e-3, (32, 48), train=5, test=3)
    monkeypatch.setitem(TASKS["shapes-unet"], "cpu", size)
    task = open_task("shapes-unet", "cpu", tmp_path, tmp_path / "drawn")
    assert task.count == 5 and task.test[0].shape == (3, 3, 32, 48) and task.classes == 5
    with pytest.raises(ValueError, match="neither a folder camvid"):
        open_task("camvid-unet", "cpu", tmp_path, tmp_path)
    write_masks(tmp_path).rename(tmp_path / "camvid_small")
    task = open_task("camvid-unet", "cpu", tmp_path, tmp_path)
    assert task.count == 5 and len(task.test[0]) == 3 + 2  # validation and test images


def test_images_and_masks_are_moved_alike(tmp_path):
    data = load_data(write_masks(tmp_path), "masks", None)
    task = Segmentation(data.train, [data.val], len(data.class_names), Size({}, 4, 1, 1.0, (16, 32), zoom=0.25))
    keys = [(0, i) for i in (0, 1, 2, 3)]
    x, y = task.batch(keys, 0, torch.device("cpu"))
    again = task.batch(keys, 0, torch.device("cpu"))
    other = task.batch([(1, i) for _, i in keys], 0, torch.device("cpu"))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    # an image whose pixels say which class they are: it must still say so after the move, but for light and edges
    task.train = (task.train[1][:, None].expand(-1, 3, -1, -1).float().contiguous(), task.train[1])
    x, y = task.batch(keys, 0, torch.device("cpu"))
    inside = y != IGNORE
    for image, mask, here in zip(x, y, inside, strict=True):
        values = [image[0][here & (mask == c)] for c in mask[here].unique()]
        medians = torch.stack([v.median() for v in values])
        assert (medians.diff() > 0.5).all()
    assert 0.3 < inside.float().mean() < 1


@pytest.mark.parametrize("name", BLOCKS)
def test_first_and_last_block_exist(name):
    build = {"cifar-resnet20": resnet(16, 3, 3), "cifar-resnet18": resnet(16, 2), "cifar-mobilenet": mobilenet(16)}
    net = build.get(name) or UNet(5, 0.25)
    recipe = variants_of(name)["first and last block in high precision"].recipe
    nv.set_precision(net, recipe)
    report = nv.coverage(net, torch.randn(16, 3, 32, 32), recipe=recipe)
    high = {row.name for row in report.rows if not row.nvfp4}
    assert all(any(name.startswith(f"{block}.") for name in high) for block in BLOCKS[name])
    assert any(row.nvfp4 for row in report.rows)


def test_the_fprop_of_two_blocks_is_a_third_of_what_they_compute():
    net, found = UNet(5, 0.25), variants_of("shapes-unet")
    share = {}
    blocks = "first and last block"
    for name in ("preset", f"{blocks} in high precision", f"high-precision fprop of the {blocks}"):
        nv.set_precision(net, found[name].recipe)
        share[name] = nv.coverage(net, torch.randn(2, 3, 32, 32), recipe=found[name].recipe).nvfp4_flops_share
    preset, high, fprop = share.values()
    assert preset > 0.95 and preset - high > 0.1
    assert preset - fprop == pytest.approx((preset - high) / 3, rel=0.02)
