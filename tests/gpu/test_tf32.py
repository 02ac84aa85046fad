"""Tests in this folder run without TF32; this one is not marked gpu, so that it runs on a CPU as well."""

from __future__ import annotations

import torch


def test_this_folder_runs_without_tf32():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
