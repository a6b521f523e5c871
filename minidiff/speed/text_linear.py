"""Linear layers that read the text and keep their results, which a run needs again in each pass."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..networks.attention import AttentionLayer
from .packed import PackedLinear, transformed

Network = TypeVar("Network", bound=nn.Module)


class TextLinear(PackedLinear):
    """A packed layer without bias that keeps what it has made of the last text, as long as that text lives.

    A text that is half of another's rows, as the conditional one is, gets its rows of what the whole gives. Texts and
    results written to since are noticed by their versions, other weights as for all that is derived of them: all but
    what is written behind torch's back (through .data, numpy or dlpack).
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B,L,C] -> [B,L,C']."""
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        first = None if traced else self._first_row(x)
        if first is None:
            return super().forward(x)
        whole = x if x._base is None else x._base
        kept = self._derive("texts", _no_texts)
        found = kept.get(whole)
        if found is None or found.versions != (whole.data_ptr(), whole._version, found.result._version):
            kept.clear()
            with torch.no_grad():
                result = super().forward(whole)
            found = kept[whole] = _Kept(result, (whole.data_ptr(), whole._version, result._version))
        rows: Tensor = found.result[first : first + len(x)]
        return rows

    def _first_row(self, x: Tensor) -> int | None:
        """Where a text begins in the one that it is a view of, or 0; None if its result cannot be kept."""
        if type(x) is not Tensor or x.ndim != 3 or x.requires_grad or x.is_inference() or not self._fits(x):
            return None
        if x.is_neg():  # a view that is read with its sign changed
            return None
        if torch.is_inference_mode_enabled() or transformed() or torch._C._len_torch_dispatch_stack() > 0:
            return None  # results that are of no use to others
        if not self._may_pack():
            return None
        whole = x if x._base is None else x._base
        alike = whole.dtype == x.dtype and whole.shape[1:] == x.shape[1:] and whole.stride() == x.stride()
        if not alike or not len(x) <= len(whole) <= 2 * len(x):
            return None
        first, rest = divmod(int(x.storage_offset() - whole.storage_offset()), max(1, whole.stride(0)))
        return first if rest == 0 and 0 <= first <= len(whole) - len(x) else None


class _Kept(NamedTuple):
    """A result, and where the text was and the versions of text and result when it was made."""

    result: Tensor
    versions: tuple[int, int, int]


def _no_texts() -> MutableMapping[Tensor, _Kept]:
    found: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()
    return found


def keep_texts(unet: Network) -> Network:
    """Make the packed layers of a UNet that read the text keep their results, in place."""
    for layer in unet.modules():
        if isinstance(layer, AttentionLayer) and layer.site.kind == "cross":
            for name in ("to_k", "to_v"):
                if type(one := getattr(layer, name)) is PackedLinear:
                    one.__class__ = TextLinear
    return unet
