"""Let a function mode of ours see the layer calls of a forward, those inside of torch's attention included."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from te_nvfp4_cv.context.bodies import ATTENTION
from te_nvfp4_cv.layer.execute import LayerCall, layer_call


class LayerCalls(TorchFunctionMode):
    """Base of modes that look at calls of convolutions and linear layers. Every other call passes."""

    def called(self, call: LayerCall, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what a layer call gives: function(*args, **kwargs), as it was written, or something in its place."""
        raise NotImplementedError

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: A002
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            with self:  # its projections are calls of linear
                return ATTENTION(*args, **kwargs)
        call = layer_call(function, args, kwargs)
        return function(*args, **kwargs) if call is None else self.called(call, function, args, kwargs)
